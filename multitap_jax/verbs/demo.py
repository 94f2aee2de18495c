"""The whole chain on pictures drawn here: no data, no download, a few minutes on two CPU cores.

  multitap demo --workdir=demo_run

Draws scenes with guidance texts and rule-made human ratings, builds a tiny Qwen2-VL checkpoint in Hugging Face format
and pre-trains it on captions, trains stage 1, embeds, fits seven ridge heads, exports, scores held-out pairs, writes
report.html. Finished phases are kept: run again after an interruption, it goes on.
"""

from absl import flags

from multitap_jax.verbs.common import whole_number


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "demo_run", "Folder of the run.", flag_values=values)
    whole_number(values, "scenes", 0, "Pictures to draw; 0 takes the demo's own number.", low=0)
    whole_number(values, "caption_steps", 0, "Pre-training steps; 0 takes the demo's own number.", low=0)
    whole_number(values, "epochs", 0, "Epochs of stage 1; 0 takes the demo's own number.", low=0)
    whole_number(values, "seed", 0, "Seed of the pictures, the weights and the order.", low=0)


def run(values: flags.FlagValues) -> int:
    from multitap_jax.demo.run import run_demo

    run_demo(
        values.workdir,
        scenes=values.scenes or None,
        caption_steps=values.caption_steps or None,
        epochs=values.epochs or None,
        seed=values.seed,
    )
    return 0
