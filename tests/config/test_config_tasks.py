"""Tasks, their folders and prompts, and the fingerprint that a resumed run compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from config_texts import HEAD, TASK, fill_folder

from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.tasks import default_prompts

Load = Callable[..., RunConfig]


# Tasks


def test_default_prompts_follow_kind_and_concept(load: Load) -> None:
    task = load(HEAD + TASK).tasks[0]
    assert task.eval_prompts == default_prompts("object", "sks dog")
    assert task.datasets[0].subsets[0].class_tokens == "a photo of sks dog"


def test_a_style_folder_of_objects_is_captioned_by_object(load: Load, tmp_path: Path) -> None:
    fill_folder(tmp_path / "Van_Gogh" / "Dogs")
    fill_folder(tmp_path / "Van_Gogh" / "Sea_Shells")
    text = '[[tasks]]\nname = "vg"\nkind = "style"\nconcept = "Van Gogh"\nimage_dir = "Van_Gogh"\n'
    task = load(HEAD + text).tasks[0]
    captions = [s.class_tokens for s in task.datasets[0].subsets]
    assert captions == ["Van Gogh image of Dogs", "Van Gogh image of Sea Shells"]
    assert task.eval_prompts[0] == "Van Gogh image of a wizard"


def test_own_prompts_are_filled_in(load: Load) -> None:
    text = 'train_prompt = "{concept}, photo"\neval_prompts = ["{concept} at sea"]\n'
    task = load(HEAD + TASK + text).tasks[0]
    assert task.datasets[0].subsets[0].class_tokens == "sks dog, photo"
    assert task.eval_prompts == ("sks dog at sea",)


def test_kohyas_repeat_folders_work_inside_a_task(load: Load) -> None:
    text = TASK.replace('"dogs"', '"train"')
    subset = load(HEAD + text).tasks[0].datasets[0].subsets[0]
    assert (subset.num_repeats, subset.class_tokens) == (10, "sks dog")


def test_inline_data_sets_of_a_task(load: Load) -> None:
    text = (
        '[[tasks]]\nname = "dog"\nconcept = "sks dog"\n'
        "[[tasks.datasets]]\nresolution = 64\n"
        '[[tasks.datasets.subsets]]\nimage_dir = "dogs"\nnum_repeats = 3\n'
    )
    (dataset,) = load(HEAD + text).tasks[0].datasets
    assert dataset.resolution == (64, 64)
    assert dataset.subsets[0].num_repeats == 3
    assert dataset.subsets[0].class_tokens == "a photo of sks dog"


def test_relative_folders_are_found_below_data_root_or_beside_the_config(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_folder(tmp_path / "root" / "dogs")
    found = load(HEAD + TASK, "--data_root", "root").tasks[0].datasets[0].subsets[0]
    assert found.image_dir == Path("root/dogs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_config(["--config", "../run.toml"]).tasks[0].datasets[0].subsets[0]
    assert found.image_dir.resolve() == tmp_path / "dogs"


def test_a_plain_run_is_one_task_named_after_its_output(load: Load) -> None:
    run = load(HEAD + 'train_data_dir = "train"\noutput_name = "my dog v1.0"\n')
    (task,) = run.tasks
    assert task.name == "my_dog_v1_0"
    assert task.concept == "sks dog"
    (subset,) = task.datasets[0].subsets
    assert (subset.num_repeats, subset.class_tokens) == (10, "sks dog")


def test_images_directly_in_train_data_dir_are_found_with_a_notice(load: Load) -> None:
    run = load(HEAD + 'train_data_dir = "dogs"\n')
    assert run.tasks[0].datasets[0].subsets[0].num_repeats == 1
    assert any("used once each" in notice for notice in run.notices)


def test_folders_without_repeats_are_ignored_with_a_notice(load: Load, tmp_path: Path) -> None:
    fill_folder(tmp_path / "train" / "notes")
    run = load(HEAD + 'train_data_dir = "train"\n')
    assert len(run.tasks[0].datasets[0].subsets) == 1
    assert any("ignored: notes" in notice for notice in run.notices)


def test_regularisation_folders_are_marked(load: Load, tmp_path: Path) -> None:
    fill_folder(tmp_path / "reg" / "1_dog")
    run = load(HEAD + 'train_data_dir = "train"\nreg_data_dir = "reg"\n')
    assert [s.is_reg for s in run.tasks[0].datasets[0].subsets] == [False, True]


def test_a_dataset_file_may_be_json(load: Load, tmp_path: Path) -> None:
    table = {"datasets": [{"subsets": [{"image_dir": "dogs", "is_reg": False}]}]}
    (tmp_path / "data.json").write_text(json.dumps(table))
    run = load(HEAD + 'dataset_config = "data.json"\ntrain_data_dir = "train"\n')
    assert run.tasks[0].datasets[0].subsets[0].image_dir == Path("dogs")
    assert any("train_data_dir is not used" in notice for notice in run.notices)


def test_metadata_subsets_need_no_image_folder(load: Load, tmp_path: Path) -> None:
    (tmp_path / "dogs" / "meta.json").write_text('{"0": {"caption": "x"}}')
    text = "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'dogs/meta.json'\n"
    (tmp_path / "data.toml").write_text(text)
    run = load(HEAD + 'dataset_config = "data.toml"\n')
    subset = run.tasks[0].datasets[0].subsets[0]
    assert (subset.image_dir, subset.metadata_file) == (Path("dogs"), Path("dogs/meta.json"))


# What is told


def test_folders_of_a_plain_run_are_told_to_be_unused_beside_tasks(load: Load) -> None:
    run = load(HEAD + 'train_data_dir = "train"\n' + TASK)
    assert any("train_data_dir is not used" in notice for notice in run.notices)


def test_a_tilde_means_the_home_folder(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    fill_folder(tmp_path / "home" / "pets" / "dogs")
    for text, flags in (
        (TASK, ["--data_root", "~/pets"]),
        (TASK.replace("dogs", "~/pets/dogs"), []),
    ):
        subset = load(HEAD + text, *flags).tasks[0].datasets[0].subsets[0]
        assert subset.image_dir == tmp_path / "home" / "pets" / "dogs"


# The fingerprint


def test_the_fingerprint_is_json_and_ignores_where_results_go(load: Load) -> None:
    one = load(HEAD + TASK, "--output_dir", "a", "--gradient_checkpointing").fingerprint()
    two = load(HEAD + TASK, "--output_dir", "b").fingerprint()
    assert json.loads(json.dumps(one)) == two


def test_the_fingerprint_does_not_depend_on_where_images_lie(load: Load, tmp_path: Path) -> None:
    before = load(HEAD + TASK).fingerprint()
    fill_folder(tmp_path / "root" / "dogs")
    assert load(HEAD + TASK, "--data_root", "root").fingerprint() == before
    fill_folder(tmp_path / "moved" / "10_sks dog")
    one = load(HEAD + 'train_data_dir = "train"\n').fingerprint()
    assert load(HEAD + 'train_data_dir = "moved"\n').fingerprint() == one


@pytest.mark.parametrize(
    "flag", ["--learning_rate=1", "--strategy=naive", "--network_dim=9", "--resolution=64"]
)
def test_the_fingerprint_follows_what_matters(load: Load, flag: str) -> None:
    assert load(HEAD + TASK, flag).fingerprint() != load(HEAD + TASK).fingerprint()


def test_appended_tasks_leave_the_earlier_ones_fingerprints(load: Load) -> None:
    short = load(HEAD + TASK).fingerprint()
    long = load(HEAD + TASK + TASK.replace('"dog"', '"cat"')).fingerprint()
    assert long["tasks"][:1] == short["tasks"]
    assert {k: v for k, v in long.items() if k != "tasks"} == {
        k: v for k, v in short.items() if k != "tasks"
    }
