"""For the API reference: the comment at a field of a class is the field's documentation."""

import griffe


class CommentsAsDocstrings(griffe.Extension):
    """Takes the comment lines above a field, or the comment behind it."""

    def on_attribute_instance(self, *, node, attr, **_):
        """Called by griffe for every attribute."""
        if attr.docstring or not isinstance(attr.parent, griffe.Class) or attr.lineno is None:
            return
        lines = attr.parent.module.source.splitlines()
        comment = _comment_behind(lines[attr.endlineno - 1]) or _comment_above(lines, attr.lineno)
        if comment:
            attr.docstring = griffe.Docstring(comment, parent=attr, lineno=attr.lineno)


def _comment_behind(line):
    return line.partition("  # ")[2]


def _comment_above(lines, number):
    """The comment lines that end before line `number`, counted from 1."""
    above = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("# "):
            break
        above.append(line.strip().removeprefix("# "))
    return " ".join(reversed(above))
