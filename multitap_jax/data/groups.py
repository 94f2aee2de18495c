"""Which records belong together: linked by a common group or picture, directly or over others."""


class Links:
    """Labels that were linked, directly or over others, and the one that stands for them: the smallest.

    So the outcome does not depend on the order in which they were linked.
    """

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def link(self, labels: list[str]) -> None:
        """Links labels with the first of them."""
        for other in labels[1:]:
            low, high = sorted((self.root(labels[0]), self.root(other)))
            self._parent[high] = low

    def root(self, label: str) -> str:
        """The label that stands for this one; itself if it was never linked."""
        parent = self._parent
        while (above := parent.get(label, label)) != label:
            parent[label] = parent.get(above, above)
            label = parent[label]
        return label
