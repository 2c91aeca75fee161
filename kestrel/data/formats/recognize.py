"""Which format a file has, by its content."""

from __future__ import annotations

from pathlib import Path

from kestrel.data.formats import cynaptics, huggingface, kaggle, own, parlai, synthetic, truecased
from kestrel.data.rows import container, rows
from kestrel.errors import KestrelError

READERS = {
    "parlai": parlai.read,
    "huggingface": huggingface.read,
    "truecased": truecased.read,
    "cynaptics": cynaptics.read,
    "synthetic": synthetic.read,
    "kaggle": kaggle.read,
    "kestrel": own.read,
}
FORMATS = tuple(READERS)

# What the first row of each format must have. ParlAI's has no columns but lines that begin with a number.
_COLUMNS = {
    "huggingface": {"personality", "utterances"},
    "truecased": {"personality", "candidates", "history", "conv_id"},
    "cynaptics": {"conv_id", "persona_b", "dialogue", "reference"},
    "synthetic": {*synthetic.PERSONAS, synthetic.CONVERSATION},
    "kaggle": {"Persona", "chat"},
    "kestrel": {"persona", "turns"},
}


def resolve(path: Path, section: str | None, wanted: str) -> str:
    """The format of a file.

    Args:
        wanted: one of `FORMATS`, which is then only checked, or "auto".
    Raises:
        KestrelError: the file is of no known format, of several, or not of the wanted one.
    """
    if wanted != "auto" and wanted not in FORMATS:
        raise KestrelError(f"{wanted!r} is not a data format; there are: auto, {', '.join(FORMATS)}.")
    if container(path) == "numbered":
        where, found, fitting = f"{path}:1", "numbered lines", ["parlai"]
    else:
        row = next(rows(path, section), None)
        if row is None:
            raise KestrelError(f"{path}: the file has no rows.")
        where, found = row.where, f"the columns {sorted(row.values)}"
        fitting = [name for name, columns in _COLUMNS.items() if columns <= row.values.keys()]
    if wanted in fitting:
        return wanted
    if wanted != "auto":
        seems = f" It looks like {' or '.join(fitting)}." if fitting else ""
        raise KestrelError(f"{where}: not in the format {wanted}, which needs {_needs(wanted)}; found {found}.{seems}")
    if len(fitting) > 1:
        raise KestrelError(f"{where}: this could be {' or '.join(fitting)}; name one as data.format.")
    if not fitting:
        known = "; ".join(f"{name}: {_needs(name)}" for name in FORMATS)
        raise KestrelError(f"{where}: of no known format: found {found}. Known are {known}.")
    return fitting[0]


def _needs(name: str) -> str:
    return "lines 'N text'" if name == "parlai" else "the columns " + ", ".join(sorted(_COLUMNS[name]))
