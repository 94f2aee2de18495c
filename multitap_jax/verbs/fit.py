"""Stage 2, second half: one ridge head per objective, in closed form, saved in the checkpoint.

  multitap fit --checkpoint=run/artefact --embeddings=embeddings       from embeddings on disk, or
  multitap fit --checkpoint=run/artefact --input=ratings.jsonl         straight from records, nothing kept on disk

Every objective gets its own alpha by cross-validation (texts of one image stay in one fold); ratings may be missing.
--selection=train-mse repeats the official code, which picks one alpha for all by its training error. The heads go into
the checkpoint's heads.safetensors; the weights of the backbone are not touched.
"""

from absl import flags

from multitap_jax.verbs.common import input_flags, load_scorer, model_flags, process_flags


def define_flags(values: flags.FlagValues) -> None:
    input_flags(values, required=False)
    model_flags(values)
    process_flags(values)
    flags.DEFINE_string("embeddings", None, "Folder that `embed` wrote (instead of --input).", flag_values=values)
    flags.DEFINE_string("cv", "5", "Number of folds, gcv, loo or logo (one image out).", flag_values=values)
    flags.DEFINE_enum("selection", "cv", ["cv", "train-mse"], "How alpha is chosen.", flag_values=values)
    flags.DEFINE_list("alphas", [], "Candidate alphas; empty scales 20 values to the data.", flag_values=values)


def run(values: flags.FlagValues) -> int:
    from multitap_jax.stage2.fit import fit_records, fit_store, make_head

    if bool(values.embeddings) == bool(values.input):
        sources = "--embeddings (a folder that `embed` wrote) or --input (records)"
        raise ValueError(f"give one of {sources}" + (", not both" if values.input else ""))
    head = make_head(values.alphas, values.cv, values.selection)
    if values.embeddings:
        fit_store(head, values.embeddings, values.checkpoint)
    else:
        fit_records(
            head,
            load_scorer(values),
            values.input,
            max_rejected=values.max_rejected,
            allow_outside_root=values.allow_outside_root,
        )
    return 0
