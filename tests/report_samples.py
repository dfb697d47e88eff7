"""Runs' folders as reports find them, without tensors, and what a page is made of."""

import html
import html.parser
import json

import numpy as np
from PIL import Image, PngImagePlugin

EVIL = "<script>document.title='taken'</script>"


CONCEPTS = ("sks robot", f"zwz {EVIL}", "olb teapot & $x_1$")


NAMES = ("robot", "evil", "teapot")


def paint(path, seed, prompt=""):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 240, (3, 3, 3), dtype=np.uint8))
    info = PngImagePlugin.PngInfo()
    if prompt:
        info.add_itxt("prompt", prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((48, 48), Image.Resampling.BICUBIC).save(path, pnginfo=info)


def record(i):
    return {
        "index": i + 1,
        "name": NAMES[i],
        "kind": "object",
        "concept": CONCEPTS[i],
        "prompts": [f"a {CONCEPTS[i]} in a jail"],
        "train_prompt": f"a photo of {CONCEPTS[i]}",
        "facts": {"images": 5, "steps": 60, "rank": 16},
    }


def make_run(folder, strategy="merge_init", seed=0, decay=0.1):
    """A finished run's folder as the runner leaves it, without tensors."""
    records = [record(i) for i in range(3)]
    steps = []
    for i, task in enumerate(records):
        paint(folder.parent / "photos" / NAMES[i] / "0.png", 100 + i)
        path = folder / f"{i + 1:02d}_{NAMES[i]}"
        path.mkdir(parents=True)
        lineage = {
            "format": 1,
            "task": task,
            "tasks": records[: i + 1],
            "hashes": {"carry": "ab" * 32},
            "strategy": {"name": strategy, "args": ["init=gaussian"]},
            "base": {"name": "tiny-sdxl", "hash": "cd" * 32},
            "training": {"steps": 60},
        }
        (path / "lineage.json").write_text(json.dumps(lineage))
        for step in range(1, 61):
            loss = 0.3 / (1 + step / 20) + 0.01 * ((step * 7) % 5)
            steps.append({"event": "step", "task": task["name"], "task_index": i + 1,
                          "step": step, "loss": loss})  # fmt: skip
    for stage in range(4):
        stage_name = "00_base" if stage == 0 else f"{stage:02d}_{NAMES[stage - 1]}"
        for i in range(3):
            if stage == 0 or i < stage:
                for n in range(2):
                    paint(folder / "samples" / stage_name / f"{NAMES[i]}_{n}.png",
                          10 * stage + i + n, f"a photo of {CONCEPTS[i]}")  # fmt: skip
    (folder / "logs").mkdir()
    lines = "\n".join(json.dumps(s) for s in steps)
    (folder / "logs" / "steps.jsonl").write_text(lines + "\n" + '{"event": "step", "ta')
    run = {
        "name": folder.name,
        "options": {"strategy": strategy, "seed": seed, "sample_prompts": EVIL},
        "strategy": {"name": strategy, "args": []},
        "base": {"name": "tiny-sdxl", "hash": "cd" * 32},
        "tasks": records,
        "images": {n: [str(folder.parent / "photos" / n)] for n in NAMES},
        "seed": seed,
        "order_seed": None,
        "status": "finished",
    }
    (folder / "run.json").write_text(json.dumps(run))
    r = [[0.8, 0.8 - decay, 0.8 - 2 * decay], [None, 0.7, 0.7 - decay], [None, None, 0.75]]
    entry = {"name": folder.name, "path": folder.as_posix(), "strategy": strategy,
             "metrics": {"effnet": {"matrix": r, "base": [0.3, 0.2, 0.25]}}}  # fmt: skip
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "scores.json").write_text(json.dumps({"runs": [entry]}))
    return folder


def looks_like(share, other=None, other_share=0.0):
    return {"share": share, "other": other, "other_share": other_share}


def add_recognition(folder):
    """The robot is a teapot by the end, the second concept blurs, the teapot is there."""
    file = folder / "evaluation" / "scores.json"
    scores = json.loads(file.read_text("utf-8"))
    entry = scores["runs"][0]
    entry["tasks"] = list(NAMES)
    entry["stages"] = [{"name": f"after {i + 1:02d}_{name}"} for i, name in enumerate(NAMES)]
    entry["recognition"] = {
        "metric": "effnet",
        "images": 4,
        "base": [looks_like(0.25, "evil", 0.75)] * 3,
        "looks": [
            [looks_like(1.0), looks_like(0.75, "evil", 0.25), looks_like(0.25, "teapot", 0.75)],
            [None, looks_like(0.75, "robot", 0.25), looks_like(0.5, "robot", 0.25)],
            [None, None, looks_like(1.0)],
        ],
    }
    file.write_text(json.dumps(scores))
    return folder


class Outline(html.parser.HTMLParser):
    """Tags and texts as a browser would see them."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.ids, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
