"""Files that torch.save wrote: nothing is read before each byte of it was compared with its checksum.

A file of torch's is a zip archive, each member with its CRC-32, which ``torch.load`` does not compare: a flipped bit
is loaded as another weight. Here the archive is checked first, through the same open file. What is left unnoticed are
bytes that nobody reads: dates, padding.

Files of the time before the archives (torch below 1.6, or ``_use_new_zipfile_serialization=False``) carry no checksum
at all: a checkpoint of this form is refused, weights of this form are read with a warning unless their name ends in
their hash, as those of torch's hub do: ``resnet18-f37072fd.pth``.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from datamodules.errors import InputError

_START, _END = b"PK\x03\x04", b"PK\x05\x06"
_END_LENGTH = 22
_FOLDER = 0x10
_HASH = re.compile(r"-([0-9a-f]{8,64})$")


def read_torch(path: Path, unchecked: bool = False) -> Any:
    """What a file of torch's holds: tensors and plain values; no code in it can run.

    Args:
        path: The file.
        unchecked: Whether a file of the old form, which has no checksums, is read, with a warning.

    Raises:
        InputError: If the file cannot be read, is truncated, altered, of the old form, or holds more than tensors and
            plain values.
    """
    try:
        with path.open("rb") as file:  # opened once: what is checked is what is read, even if another takes its name
            fault = _fault(file)
            old = fault is not None and not _claims_to_be_zip(file)
            if fault is not None and not (old and _is_old(file)):
                raise InputError(f"{path}: {fault}")
            unsealed = old and not _named_by_hash(path, file)
            file.seek(0)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # what torch raises is not documented, and differs with the damage
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise InputError(
                f"{path}: refused: it holds more than tensors and plain values, and might run code"
            ) from error
        raise InputError(f"{path}: truncated or not a checkpoint ({' '.join(str(error).split())[:120]})") from error
    if unsealed and not unchecked:
        raise InputError(
            f"{path}: of torch's old form, which has no checksums, so that damage goes unnoticed; write it anew: "
            "torch.save(torch.load(FILE), FILE)"
        )
    if unsealed:
        warnings.warn(f"{path}: of torch's old form, without checksums: damage goes unnoticed", stacklevel=2)
    return loaded


def check_torch(path: Path) -> None:
    """Compare a file of torch's with its checksums, where it has some, and read nothing of it.

    Raises:
        InputError: If it is truncated or altered.
    """
    with path.open("rb") as file:
        fault = _fault(file)
        if fault is not None and _claims_to_be_zip(file):
            raise InputError(f"{path}: {fault}")


def _claims_to_be_zip(file: BinaryIO) -> bool:
    """Whether it begins or ends like an archive: of one whose first bytes were altered the end still tells."""
    file.seek(0)
    return file.read(len(_START)) == _START or zipfile.is_zipfile(file)


def _is_old(file: BinaryIO) -> bool:
    """Whether it begins like a pickle, or like a tar archive of them."""
    file.seek(0)
    return file.read(1) == b"\x80" or _is_tar(file)


def _is_tar(file: BinaryIO) -> bool:
    file.seek(257)
    return file.read(5) == b"ustar"


def _named_by_hash(path: Path, file: BinaryIO) -> bool:
    found = _HASH.search(path.stem)
    file.seek(0)
    return found is not None and hashlib.sha256(file.read()).hexdigest().startswith(found[1])


def _fault(file: BinaryIO) -> str | None:
    """What is wrong with it as an archive that torch wrote; None: every member matches its checksum."""
    file.seek(0)
    start = file.read(len(_START))
    size = file.seek(0, 2)
    file.seek(max(0, size - _END_LENGTH))
    end = file.read()
    try:
        with zipfile.ZipFile(file) as archive:
            if start != _START or not (end.startswith(_END) and end.endswith(b"\0\0")):
                return "altered or damaged: bytes stand before or after the archive"
            if (strange := _strange(archive.infolist())) is not None:
                return f"altered or damaged: {strange}"
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        return f"truncated or not a checkpoint ({' '.join(str(error).split())[:120]})"
    except Exception as error:  # headers that ask for what there is not: another version, a password, negative seeks
        return f"altered or damaged ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None if wrong is None else f"altered or damaged: {wrong} does not match its checksum"


def _strange(members: list[zipfile.ZipInfo]) -> str | None:
    """What torch never writes, and reads as something else than the checksums are of."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return "a member is compressed"
    if any(member.external_attr & _FOLDER for member in members):  # read as nothing
        return "a member is called a folder"
    if len({member.filename for member in members}) < len(members):  # another is checked than is read
        return "two members have one name"
    return None
