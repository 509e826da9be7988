"""Data set files to samples: one function per format, listed in DATASETS.

A format is `format(row, where, media_root, *, options) -> Sample`. where is "file:row" and becomes the sample's key. It
raises BadSample for a row that cannot be trained on, after checks that open no media file.
"""

from pathlib import Path
from types import MappingProxyType

from fastpo.config import Source
from fastpo.data.formats.conversations import llava, ranked, spo
from fastpo.data.formats.fields import bad as bad
from fastpo.data.formats.files import rows
from fastpo.data.formats.pairs import dpo, mia, perpo, rrpo, videochat2
from fastpo.data.formats.prompts import rollout, visual_rft
from fastpo.plugins import resolve
from fastpo.sample import BadSample, Sample

DATASETS = MappingProxyType(
    {
        "dpo": dpo,
        "llava": llava,
        "mia": mia,
        "perpo": perpo,
        "ranked": ranked,
        "rollout": rollout,
        "rrpo": rrpo,
        "spo": spo,
        "videochat2": videochat2,
        "visual_rft": visual_rft,
    }
)


def samples(source: Source, media_root: Path) -> list[Sample | BadSample]:
    """Every row in file order: a sample, or what is wrong with the row. A sample's key is "path:row", counted from 0.

    Raises ValueError, naming the file and the line where there is one, for a file that cannot be read.
    """
    convert = resolve(DATASETS, source, key="data")
    found = []
    for number, row in enumerate(rows(source.path)):
        where = f"{source.path}:{number}"
        try:
            found.append(convert(row, where, media_root))
        except BadSample as error:
            error.row = where
            found.append(error)
    return found
