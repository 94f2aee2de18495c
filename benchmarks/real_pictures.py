"""The five verbs on real pictures with human ratings, split by prompt. The numbers are what they are.

  python benchmarks/real_pictures.py --data=avt_ai_images --checkpoint=demo_run/train/artefact --workdir=runs/real

DATA holds ratings.jsonl and images/ of avt_ai_images (Goering et al., IEEE Access 2023; 108 pictures by four generators
for 27 prompts, mean ratings from 1 to 5 of prompt_matching, realism, appeal). A third of the prompts is held out, so no
text and no picture stands on both sides. Each verb runs as a user would run it, in this process.

Pictures and ratings are public (github.com/Telecommunication-Telemedia-Assessment/avt_ai_images); ratings.jsonl is a
conversion of them to one record a picture: "id", "image" ("images/..."), "text" (the prompt) and "ratings" with the
mean, from 1 to 5, of "prompt_matching", "realism" and "appeal".
"""

import argparse
import json
from pathlib import Path

from multitap_jax import cli

HELD_OUT_EVERY = 3
TARGET = "ratings.prompt_matching"


def split_by_prompt(data: Path, workdir: Path) -> tuple[Path, Path]:
    """Writes train.jsonl and test.jsonl with absolute image paths; every third prompt is held out."""
    records = [json.loads(line) for line in (data / "ratings.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = sorted({record["text"] for record in records})
    held_out = set(prompts[::HELD_OUT_EVERY])
    paths = workdir / "train.jsonl", workdir / "test.jsonl"
    for path, wanted in zip(paths, (False, True), strict=True):
        lines = [
            record | {"image": str((data / record["image"]).resolve()), "group": record["text"]}
            for record in records
            if (record["text"] in held_out) == wanted
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def multitap(*arguments: object) -> None:
    """Runs a verb; raises SystemExit with its exit code unless it is 0."""
    print(f"\n$ multitap {' '.join(map(str, arguments))}", flush=True)
    if code := cli.main([str(argument) for argument in arguments]):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "checkpoint", "workdir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    if not (args.data / "ratings.jsonl").is_file():
        parser.error(
            f"--data={args.data}: no ratings.jsonl there; --help says what it is and where the pictures are from"
        )
    if not args.checkpoint.is_dir():
        parser.error(f"--checkpoint={args.checkpoint}: no such folder; `multitap demo` leaves demo_run/train/artefact")
    args.workdir.mkdir(parents=True, exist_ok=True)
    train, test = split_by_prompt(args.data, args.workdir)
    lora = Path(__file__).parents[1] / "configs" / "lora.py"
    run, outside = args.workdir / "run", "--allow_outside_root"
    multitap(
        "train",
        f"--config={lora}",
        f"--workdir={run}",
        f"--config.model.checkpoint={args.checkpoint}",
        f"--config.data.train={train}",
        f"--config.data.evaluation={test}",
        f"--config.data.target={TARGET}",
        "--config.data.target_range=(1.0, 5.0)",
        "--config.data.allow_outside_root=True",
        "--config.model.dtype=float32",
        "--config.batch_size=12",
        "--config.epochs=10",
    )
    artefact = run / "artefact"
    store, scores = args.workdir / "embeddings", args.workdir / "scores.jsonl"
    multitap("embed", f"--checkpoint={artefact}", f"--input={train}", f"--output={store}", outside)
    multitap("fit", f"--checkpoint={artefact}", f"--embeddings={store}")
    multitap("score", f"--checkpoint={artefact}", f"--input={test}", f"--output={scores}", outside)
    multitap(
        "evaluate",
        f"--scores={scores}",
        f"--input={test}",
        f"--output={args.workdir / 'evaluation'}",
        f"--target={TARGET}",
        "--target_range=1,5",
        outside,
    )


if __name__ == "__main__":
    main()
