"""Copying a safetensors file with some tensors given other rows, without reading it into memory.

The format (huggingface.co/docs/safetensors): 8 bytes of length, a JSON header with each tensor's dtype, shape and place
in the data, the data. The library writes a file from tensors in memory; here the bytes go from file to file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from coati.errors import UserError

BLOCK, METADATA = 1 << 24, "__metadata__"


@dataclass
class NewRows:
    """A tensor's first `kept` rows stay as they are; `blocks` are the bytes of the `count` rows behind them."""

    kept: int
    count: int
    blocks: Iterable[bytes]


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header, `{name: {"dtype": str, "shape": list[int], "data_offsets": [first, behind]}}` and perhaps
    `__metadata__`, and where the data begin.

    Raises:
        UserError: the file is no safetensors file, or truncated.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); the model's folder is incomplete.") from None
    except ValueError:
        raise UserError(f"{path} is not a safetensors file; save the model again.") from None
    end = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    if end != path.stat().st_size:
        raise UserError(f"{path} has {path.stat().st_size} bytes instead of {end}; copy or save the model again.")
    return header, 8 + length


def copy_file(source: Path, target: Path, changed: dict[str, NewRows], dropped: set[str]) -> None:
    """Copy the tensors of `source` in their order: those in `changed` with new rows, without the `dropped` ones.

    Raises:
        UserError: `source` is no safetensors file, or truncated.
    """
    header, begin = read_header(source)
    if not (changed.keys() | dropped) & header.keys():
        shutil.copyfile(source, target)
        return
    names = [name for name in header if name != METADATA and name not in dropped]
    names.sort(key=lambda name: header[name]["data_offsets"])
    text = json.dumps(_new_header(header, names, changed), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            first, behind = header[name]["data_offsets"]
            reader.seek(begin + first)
            if name in changed:
                _copy_bytes(reader, writer, _row_size(header[name]) * changed[name].kept)
                writer.writelines(changed[name].blocks)
            else:
                _copy_bytes(reader, writer, behind - first)


def _new_header(header: dict[str, Any], names: list[str], changed: dict[str, NewRows]) -> dict[str, Any]:
    new = {METADATA: header[METADATA]} if METADATA in header else {}
    end = 0
    for name in names:
        entry = header[name]
        first, behind = entry["data_offsets"]
        shape, size = entry["shape"], behind - first
        if name in changed:
            shape = [changed[name].kept + changed[name].count, *shape[1:]]
            size = _row_size(entry) * shape[0]
        new[name] = entry | {"shape": shape, "data_offsets": [end, end + size]}
        end += size
    return new


def _row_size(entry: dict[str, Any]) -> int:
    first, behind = entry["data_offsets"]
    return (behind - first) // entry["shape"][0]


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, count: int) -> None:
    while count:
        block = reader.read(min(BLOCK, count))
        writer.write(block)
        count -= len(block)
