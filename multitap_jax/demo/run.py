"""The demo, phase by phase. A finished phase is kept, so an interrupted demo goes on where it stopped."""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flax import nnx
from PIL import Image
from rich.console import Console

from multitap_jax.config import TrainConfig, from_config_dict
from multitap_jax.data.processing import Contract, Processing
from multitap_jax.demo.checkpoint import build_checkpoint
from multitap_jax.demo.pretrain import pretrain
from multitap_jax.demo.report import write_report
from multitap_jax.demo.summary import RUNS, judge, report_data, summary_table
from multitap_jax.demo.texts import vocabulary_sample
from multitap_jax.demo.world import WorldPaths, build_world
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import ContractWarning, export_heads, export_official
from multitap_jax.scoring.job import score_file
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage1.run import run_training
from multitap_jax.stage2.embed import embed_records
from multitap_jax.stage2.fit import fit_store, make_head
from multitap_jax.weights.hub import load_backbone, save_backbone

SCENES = 2400
CAPTION_STEPS = 700
EPOCHS = 3
HELDOUT = 0.1
POLICY = "square:84"


@dataclass
class Demo:
    """Where the demo stands: its folder, what each phase took, and how to skip the finished ones."""

    workdir: Path
    console: Console
    settings: dict
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def _journal(self) -> Path:
        return self.workdir / "phases.json"

    def start(self) -> None:
        """Reads what is finished; refuses a folder of other settings, or of somebody else.

        Raises:
          ValueError: if the folder holds a demo with other settings, or something else.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        if not self._journal.is_file():
            if any(self.workdir.iterdir()):
                raise ValueError(
                    f"{self.workdir}: is not empty and holds no demo, so nothing is written into it; choose another "
                    "--workdir"
                )
            self._save()
            return
        saved = json.loads(self._journal.read_text())
        if saved["settings"] != self.settings:
            raise ValueError(
                f"{self.workdir} holds a demo with {saved['settings']}, this one has {self.settings}; "
                "choose another --workdir or remove the folder"
            )
        self.seconds = saved["seconds"]

    @contextmanager
    def phase(self, name: str) -> Iterator[bool]:
        """Announces a phase, times it, and notes it as finished; yields whether there is anything left to do."""
        todo = name not in self.seconds
        self.console.rule(f"[bold]{name}" + ("" if todo else " (done before)"), align="left")
        start = time.perf_counter()
        yield todo
        if todo:
            self.seconds[name] = time.perf_counter() - start
            self._save()

    def _save(self) -> None:
        self._journal.write_text(json.dumps({"settings": self.settings, "seconds": self.seconds}))


def run_demo(
    workdir: str | Path,
    *,
    scenes: int | None = None,
    caption_steps: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
) -> Path:
    """Runs the whole chain in `workdir`; returns the path of report.html.

    Args:
      workdir: folder of the run.
      scenes: pictures to draw (default 2,400).
      caption_steps: steps of the backbone's pre-training (default 700).
      epochs: epochs of stage 1 (default 3).
      seed: of pictures, weights and order.
    """
    settings = {
        "scenes": scenes or SCENES,
        "caption_steps": caption_steps or CAPTION_STEPS,
        "epochs": epochs or EPOCHS,
        "seed": seed,
    }
    demo = Demo(Path(workdir), Console(), settings)
    demo.start()
    folder, before = demo.workdir, len(demo.seconds)
    with demo.phase("1 draw pictures, write texts, rate them"):
        world = build_world(folder / "world", settings["scenes"], seed, HELDOUT)
    with demo.phase("2 build a tiny Qwen2-VL and show it captioned pictures") as todo:
        if todo:
            _make_base(folder / "base", world, settings)
    with demo.phase("3 train stage 1") as todo:
        if todo and run_training(training_config(world, folder, settings), folder / "train").artefact is None:
            raise KeyboardInterrupt
    artefact = folder / "train" / "artefact"
    with demo.phase("4 embed the training pairs") as todo:
        if todo:
            scorer = Scorer.from_pretrained(artefact)
            demo.console.print(str(embed_records(scorer, world.train, folder / "embeddings", show_progress=True)))
    with demo.phase("5 fit seven ridge heads") as todo:
        if todo:
            fit_store(make_head([], 5, "cv"), folder / "embeddings", artefact)
    with demo.phase("6 export") as todo:
        if todo:
            export_heads(artefact, folder / "export" / "heads")
            with warnings.catch_warnings():  # that the official code squeezes pictures to another size is no news here
                warnings.simplefilter("ignore", ContractWarning)
                export_official(artefact, folder / "export" / "official")
    with demo.phase("7 score held-out pairs: trained, untrained, blanked pictures") as todo:
        if todo:
            _score_all(demo, world, artefact)
    with demo.phase("8 evaluate and report"):
        results = judge(world.heldout, {name: scores_path(folder, name) for name in RUNS})
        demo.console.print(summary_table(results))
        facts = _facts(settings, world, artefact)
        data = report_data(results, Artefact.open(artefact), folder / "train" / "metrics.jsonl", demo.seconds, facts)
        report = write_report(folder / "report.html", data)
    earlier = f", earlier runs included (remove {folder} to begin anew)" if before else ""
    demo.console.print(f"[bold]{sum(demo.seconds.values()):.0f} s in all{earlier}.[/] Open {report}")
    return report


def _make_base(base: Path, world: WorldPaths, settings: dict) -> None:
    build_checkpoint(base, vocabulary_sample(), seed=settings["seed"])
    processing = Processing.from_folder(base, Contract(image_policy=POLICY))
    trained = pretrain(
        load_backbone(base), processing, world.train, seed=settings["seed"], steps=settings["caption_steps"]
    )
    save_backbone(trained, base)


def training_config(world: WorldPaths, folder: Path, settings: dict) -> TrainConfig:
    """Stage 1 of the demo: the model is tiny, so the rate is far above that of a real fine-tuning run."""
    return from_config_dict(
        TrainConfig,
        {
            "model": {"checkpoint": str(folder / "base"), "dtype": "float32"},
            "data": {
                "train": str(world.train),
                "evaluation": str(world.heldout),
                "image_policy": POLICY,
                "shuffle": "groups",
            },
            "optimizer": {
                "learning_rate": 1.5e-3,
                "schedule": "cosine",
                "warmup_ratio": 0.05,
                "weight_decay": 0.0,
                "b2": 0.98,
            },
            "batch_size": 48,
            "epochs": settings["epochs"],
            "seed": settings["seed"],
            "evaluate_every": 500,
            "log_every": 20,
            "checkpoint": {"every_steps": 1000, "keep": 1},
        },
    )


def _score_all(demo: Demo, world: WorldPaths, artefact: Path) -> None:
    folder = demo.workdir
    backbone = load_backbone(folder / "base")
    head = RewardHead(backbone.config.text.hidden_size, rngs=nnx.Rngs(demo.settings["seed"]))
    untrained = Artefact.save(
        folder / "untrained",
        RewardModel(backbone, head),
        base=folder / "base",
        contract=Artefact.open(artefact).manifest.contract,
        overwrite=True,
    )
    blanked = _blank(world)
    for name, model, records in (
        ("trained", artefact, world.heldout),
        ("untrained", untrained.folder, world.heldout),
        ("blanked", artefact, blanked),
    ):
        scorer = Scorer.from_pretrained(model)
        demo.console.print(f"{name}: {score_file(scorer, records, scores_path(folder, name), show_progress=True)}")


def _blank(world: WorldPaths) -> Path:
    """The held-out records with one grey picture in place of all."""
    path = world.heldout.with_name("heldout_blank.jsonl")
    Image.new("RGB", (84, 84), (128, 128, 128)).save(world.heldout.with_name("blank.png"))
    lines = [json.loads(line) | {"image": "blank.png"} for line in world.heldout.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _facts(settings: dict, world: WorldPaths, artefact: Path) -> dict[str, str]:
    config = json.loads((artefact / "config.json").read_text())
    pairs = [sum(1 for _ in path.open()) for path in (world.train, world.heldout)]
    return {
        "command": "multitap demo " + " ".join(f"--{name}={value}" for name, value in settings.items()),
        "data": f"{settings['scenes']:,} pictures; {pairs[0]:,} training pairs, {pairs[1]:,} held-out pairs",
        "model": f"Qwen2-VL, hidden {config['hidden_size']}, {config['num_hidden_layers']} decoder layers, "
        f"{config['vision_config']['depth']} vision block, pre-trained on captions here",
    }


def scores_path(folder: Path, name: str) -> Path:
    """Where the scores of one of the three runs are."""
    return folder / "scores" / f"{name}.jsonl"
