"""`lcp train` and train_continual_sdxl.py: a config is checked before torch is imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.config.logs import configure_messages
from lcp_plugin.config.write import write_given_options
from lcp_plugin.errors import ConfigError, FinishedError, LcpError, Page, explaining
from lcp_plugin.formats.disk import explain_os_error
from lcp_plugin.run.session import without_collecting

log = logging.getLogger(__name__)
INTERRUPTED = 130
OUT_OF_MEMORY = (
    "out of memory; what helps, strongest first: --gradient_checkpointing, --cache_latents and "
    "--cache_text_encoder_outputs, --mixed_precision bf16, --optimizer_type AdamW8bit, a smaller "
    "--resolution or --network_dim (--preset 8gb sets them together)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or answers a question about it; returns the exit status."""
    status = _serve(sys.argv[1:] if argv is None else argv)
    if status != 0:
        _leave_processes(failed=True)
    return status


def _serve(argv: Sequence[str]) -> int:
    try:
        with explaining(Page.OPTIONS, ConfigError):
            config = load_config(argv)
            _open_log(config)
            return _train(config) if not _answer(config) else 0
    except LcpError as error:
        return _complain(error)
    except OSError as error:
        if (told := explain_os_error(error)) is None:
            raise
        return _complain(told)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state.", file=sys.stderr)
        return INTERRUPTED


def _complain(error: LcpError) -> int:
    print(error.told, file=sys.stderr)
    return error.exit_code


def _open_log(config: RunConfig) -> None:
    try:
        configure_messages(config.options)
    except OSError as error:
        name = config.options.console_log_file
        raise ConfigError(f"console_log_file = {name!r} cannot be written: {error}.") from error


def _answer(config: RunConfig) -> bool:
    """Answers a question instead of training; whether there was one."""
    options = config.options
    if options.list_strategies:
        from lcp_plugin.registry import describe_strategies

        print(describe_strategies())
    elif options.output_config:
        print(f"written to {write_given_options(config)}")
    elif options.dry_run:
        print(_describe(config))
    return options.list_strategies or options.output_config or options.dry_run


def _describe(config: RunConfig) -> str:
    """The plan of a dry run, at the base's own size where the base is on disk."""
    from lcp_plugin.run.dry_run import describe_run
    from lcp_plugin.run.plan import check_before_run
    from lcp_plugin.run.settling import settle, settle_init
    from lcp_plugin.sdxl.traits import is_at_hand, read_traits

    name = config.options.pretrained_model_name_or_path
    if not is_at_hand(name):
        config = settle_init(config)
        check_before_run(config, has_base=False)
        return describe_run(config)
    config = settle(config)
    check_before_run(config)
    return describe_run(config, read_traits(name).native_side)


def _train(config: RunConfig) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with without_collecting():
        import torch

        from lcp_plugin.run.follow_up import close_run, next_steps, sum_up_run
        from lcp_plugin.run.runner import execute
        from lcp_plugin.training.loop import Interrupted

    _tell_of_idle_gpus(torch.cuda.device_count())
    try:
        run = execute(config)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return INTERRUPTED
    except FinishedError:
        if not _close_anew(config):
            raise
        return 0
    except torch.OutOfMemoryError:
        print(f"error: {OUT_OF_MEMORY}\nsee {Page.MEMORY}", file=sys.stderr)
        return 1
    told = sum_up_run(run) if run.is_main else ""
    folder, options, device = run.output_dir, run.options, run.device
    del run  # the model leaves memory before another is loaded for the scores
    _leave_processes(failed=False)
    if told:
        made = close_run(folder, options, device)
        print("\n".join([told, *made, *next_steps(folder, options)]))
    return 0


def _tell_of_idle_gpus(count: int) -> None:
    """A process by itself trains on one GPU; who has several learns what would use them."""
    if count > 1 and "WORLD_SIZE" not in os.environ:
        log.warning(
            "%d GPUs are here, one is used; all of them: "
            "accelerate launch --multi_gpu -m lcp_plugin train ... (or train_continual_sdxl.py)",
            count,
        )


def _close_anew(config: RunConfig) -> bool:
    """Makes what a kill has left out behind a run's last task; whether anything was missing."""
    from lcp_plugin.run.follow_up import close_run, next_steps
    from lcp_plugin.sdxl.devices import choose_device

    if os.environ.get("RANK", "0") != "0":
        return True  # the main process's business
    options = config.options
    folder = Path(options.output_dir or "output") / (options.output_name or "last")
    made = close_run(folder, options, choose_device())
    if made:
        print(
            "\n".join(
                [
                    f"finished     {folder}; what was missing is made",
                    *made,
                    *next_steps(folder, options),
                ]
            )
        )
    return bool(made)


def _leave_processes(failed: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from lcp_plugin.training.processes import end_processes

        end_processes(failed)


if __name__ == "__main__":
    sys.exit(main())
