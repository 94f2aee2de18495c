"""A cache in the hub's layout, written without a network: blobs, links to them in a snapshot, a branch."""

from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_commit(cache: Path, repository: str, source: Path, commit: str = COMMIT) -> Path:
    """Puts a folder's files into the cache as a commit, to which `main` moves; returns the snapshot."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for part in (root / "refs", root / "blobs"):
        part.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        blob = f"{commit[:8]}-{path.name}"
        (root / "blobs" / blob).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    (root / "refs" / "main").write_text(commit)
    return snapshot
