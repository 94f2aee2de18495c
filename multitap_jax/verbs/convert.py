"""Turn a public dataset, as you downloaded it, into records.

  multitap convert --dataset=polaris --source=Polaris --split=train --output=polaris
  multitap convert --dataset=flickr8k-expert --source=flickr8k --images=Flicker8k_Dataset --output=expert
  multitap convert --dataset=flickr8k-expert --source=flickr8k --images=none --output=expert     scores exist already
  multitap convert --dataset=table --source=mine.csv --columns=text=caption,image=file,ratings.mos=mos --output=mine

The output folder has records.jsonl, the pictures (embedded ones written once, files as hard links), rejected.jsonl and
dataset.json (what it is, counts, source files with checksums). train, embed, score and evaluate take it as --input or
--config.data.train. Nothing is fetched. Run again, the same command makes it anew, and finds the pictures.
"""

from absl import flags

from multitap_jax.verbs.common import share


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("dataset", None, "Which one; see the table below. Required.", flag_values=values)
    flags.DEFINE_string("source", None, "Folder (or file) of what you downloaded. Required.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder to write. Required.", flag_values=values)
    flags.DEFINE_string(
        "images", None, "Folder of the pictures, if they lie elsewhere; none: take no pictures.", flag_values=values
    )
    flags.DEFINE_string("split", None, "train, validation, test or all (default: in the table).", flag_values=values)
    flags.DEFINE_list(
        "columns", [], "For table: RECORD=FILE columns, such as text=caption,ratings.tone=tone.", flag_values=values
    )
    share(values, "max_rejected", 0.01, "Stop when a larger share of rows gives no record.")
    flags.DEFINE_bool("allow_subset", False, "Accept another number of records than published.", flag_values=values)
    flags.mark_flags_as_required(["dataset", "source", "output"], flag_values=values)


def more_help() -> str:
    """The table of datasets."""
    from multitap_jax.data.sources.registry import describe

    return describe()


def run(values: flags.FlagValues) -> int:
    from multitap_jax.data.sources import convert, dataset_named
    from multitap_jax.scoring.progress import progress_bar

    dataset = dataset_named(values.dataset)
    total = dataset.counts.get(values.split or dataset.split)
    with progress_bar(total, label=f"reading {dataset.title}", unit="rows") as advance:
        done = convert(
            values.dataset,
            values.source,
            values.output,
            images=values.images,
            split=values.split,
            columns=_columns(values.columns),
            max_rejected=values.max_rejected,
            allow_subset=values.allow_subset,
            advance=advance,
        )
    print(done)
    return 0


def _columns(pairs: list[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise ValueError(f"--columns: {wrong[0]!r} is not RECORD=FILE, such as text=caption")
    return found
