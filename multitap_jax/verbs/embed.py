"""Stage 2, first half: write the frozen model's embeddings of many pairs to disk.

  multitap embed --checkpoint=run/artefact --input=ratings.jsonl --output=embeddings

Writes sharded safetensors with ids, groups and ratings beside the embeddings, and a manifest; unusable records go to
rejected.jsonl in the same folder. Killed and started again, it goes on after the last finished shard. `fit` takes the
folder as --embeddings; NumPy reads it in three lines (multitap_jax/stage2/store_format.py).
"""

from absl import flags

from multitap_jax.verbs.common import input_flags, load_scorer, model_flags, process_flags, whole_number


def define_flags(values: flags.FlagValues) -> None:
    input_flags(values)
    model_flags(values)
    process_flags(values)
    flags.DEFINE_string("output", None, "Folder of the embeddings. Required.", flag_values=values)
    whole_number(values, "shard_rows", 4096, "Records a shard.")
    flags.mark_flag_as_required("output", flag_values=values)


def run(values: flags.FlagValues) -> int:
    from multitap_jax.parallel.distributed import is_main_process
    from multitap_jax.stage2.embed import embed_records

    summary = embed_records(
        load_scorer(values),
        values.input,
        values.output,
        shard_rows=values.shard_rows,
        max_rejected=values.max_rejected,
        allow_outside_root=values.allow_outside_root,
        show_progress=True,
    )
    if is_main_process():
        print(summary)
    return 0
