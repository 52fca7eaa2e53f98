"""What a remote reward and its server say to each other: protocol 1, JSON over HTTP.

    GET /health   ->  {"name", "version", "protocol": 1}
    POST /score   {"protocol": 1, "reward": name,
                   "items": [{"id", "prompt", "image": {"format", "data"}, "metadata": {}}]}
                  ->  {"scores": [{"id", "score": float or null, "error": text or null, "aux": {}}]}
    any failure   ->  {"error": {"type", "message"}} with an HTTP status of 400 or more

Images are base64 of PNG files, or of JPEG files of quality 95 without chroma subsampling. A score
of null says that the image could not be scored. Nothing is ever pickled.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lit_align.rewards.scoring import RewardError

PROTOCOL = 1
ImageFormat = Literal["png", "jpeg"]
FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg")
_LARGEST = torch.finfo(torch.float32).max


class ProtocolError(RewardError):
    """A message does not keep the protocol; the text says what is wrong with it."""


class TooLargeError(ProtocolError):
    """A message keeps the protocol but is beyond a limit of the server."""


@dataclass(frozen=True)
class Item:
    """One image to score.

    Attributes:
        id: Unique in the request.
        prompt: What the image should show.
        format: "png" or "jpeg".
        data: The file's bytes.
        metadata: What is known of the prompt.
    """

    id: str
    prompt: str
    format: str
    data: bytes
    metadata: dict[str, Any]


def to_json(value: Any) -> bytes:
    """Return the JSON text of a value.

    Raises:
        ValueError: If JSON cannot say it: a number that is not finite, an object.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be written as JSON ({error})") from error


def from_json(text: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is none.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def encode_image(pixels: Tensor, file_format: ImageFormat = "png") -> bytes:
    """Return the file of an image [H, W, 3] uint8."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.numpy())
    if file_format == "png":
        image.save(buffer, "PNG", compress_level=1)  # lossless at any level; this is the quickest
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode_image(item: Item, max_pixels: int) -> Tensor:
    """Return the pixels [3, H, W] uint8 of an item's image.

    Args:
        item: Holds the file.
        max_pixels: Height times width; looked up in the file's head before anything is unpacked.

    Raises:
        TooLargeError: If it has more pixels.
        ProtocolError: If it is no image of its format.
    """
    too_large = f"the image {item.id!r} has more than {max_pixels} pixels"
    try:
        with Image.open(io.BytesIO(item.data), formats=[item.format.upper()]) as image:
            if image.width * image.height > max_pixels:
                raise TooLargeError(f"{too_large}: {image.width} x {image.height}")
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            return pixels.view(image.height, image.width, 3).movedim(-1, 0)
    except Image.DecompressionBombError as error:
        raise TooLargeError(too_large) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ProtocolError(f"the image is no readable {item.format} file ({error})") from error


def score_request(reward: str, items: Sequence[Item]) -> bytes:
    """Return the body of ``POST /score``.

    Raises:
        ValueError: If an item's metadata cannot be written as JSON.
    """
    for item in items:
        try:
            to_json(item.metadata)
        except ValueError as error:
            raise ValueError(f"The metadata of the prompt {item.prompt!r}: {error}.") from error
    described = [
        {
            "id": item.id,
            "prompt": item.prompt,
            "image": {"format": item.format, "data": base64.b64encode(item.data).decode()},
            "metadata": item.metadata,
        }
        for item in items
    ]
    return to_json({"protocol": PROTOCOL, "reward": reward, "items": described})


def parse_score_request(value: Any, max_items: int) -> tuple[str, list[Item]]:
    """Return the reward's name and the items of a request.

    Raises:
        ProtocolError: If it does not keep the protocol.
        TooLargeError: If there are more than `max_items` items.
    """
    request = _mapping(value, "the request")
    protocol = request.get("protocol")
    if protocol != PROTOCOL or isinstance(protocol, bool):
        raise ProtocolError(f"'protocol' must be {PROTOCOL}, got {_short(protocol)}")
    name = _text(request, "reward", "the request")
    items = request.get("items")
    if not isinstance(items, list) or not items:
        raise ProtocolError(f"'items' must be a list of one item or more, got {_short(items)}")
    if len(items) > max_items:
        raise TooLargeError(f"there are {len(items)} items, and at most {max_items} may come")
    parsed = [_parse_item(item, f"item {place}") for place, item in enumerate(items)]
    if len({item.id for item in parsed}) < len(parsed):
        raise ProtocolError("two items have the same 'id'")
    return name, parsed


def _parse_item(value: Any, where: str) -> Item:
    item = _mapping(value, where)
    image = _mapping(item.get("image"), f"'image' of {where}")
    file_format = _text(image, "format", where)
    if file_format not in FORMATS:
        raise ProtocolError(f"'format' of {where} must be 'png' or 'jpeg', got {file_format!r}")
    try:
        data = base64.b64decode(_text(image, "data", where), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(f"'data' of {where} is no base64 ({error})") from error
    metadata = item.get("metadata")
    return Item(
        _text(item, "id", where),
        _text(item, "prompt", where),
        file_format,
        data,
        {} if metadata is None else _mapping(metadata, f"'metadata' of {where}"),
    )


def score_answer(ids: Sequence[str], scores: Sequence[float], errors: dict[str, str]) -> bytes:
    """Return the body that answers ``POST /score``.

    Args:
        ids: Of the items.
        scores: One per item, NaN where an image could not be scored.
        errors: Why not, by id.
    """
    entries: list[dict[str, Any]] = [
        {
            "id": key,
            "score": None if math.isnan(score) else score,
            "error": errors.get(key, "the reward gave NaN") if math.isnan(score) else None,
            "aux": {},
        }
        for key, score in zip(ids, scores, strict=True)
    ]
    return to_json({"scores": entries})


def parse_scores(value: Any, ids: Sequence[str]) -> tuple[list[float], list[str]]:
    """Return what a server answered to a request.

    Args:
        value: The answer.
        ids: Of the request's items.

    Returns:
        A score per id, NaN where there is none; and what was said of those.

    Raises:
        ProtocolError: If the answer does not keep the protocol.
    """
    entries = _mapping(value, "the answer").get("scores")
    if not isinstance(entries, list):
        raise ProtocolError(f"'scores' must be a list, got {_short(entries)}")
    if len(entries) != len(ids):
        raise ProtocolError(f"there are {len(entries)} scores for {len(ids)} images")
    found = dict.fromkeys(ids, math.nan)
    seen: set[str] = set()
    errors = []
    for place, value in enumerate(entries):
        entry = _mapping(value, f"score {place}")
        score = _score(entry.get("score"), place)
        if math.isnan(score):
            errors.append(str(entry.get("error") or "no reason given")[:200])
        if (key := entry.get("id")) is None:  # of no image that could be named: NaN stays
            errors.append(f"score {place} has no 'id'")
            continue
        if not isinstance(key, str) or key not in found:
            raise ProtocolError(f"score {place} has the unknown 'id' {_short(key)}")
        if key in seen:
            raise ProtocolError(f"two scores have the 'id' {key!r}")
        seen.add(key)
        found[key] = score
    return [found[key] for key in ids], errors


def _score(value: Any, place: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProtocolError(f"score {place} must be a number or null, got {_short(value)}")
    if abs(value) > _LARGEST:
        raise ProtocolError(f"score {place} must be finite in float32, got {_short(value)}")
    return float(value)


def parse_health(value: Any) -> tuple[str, str]:
    """Return name and version of the reward that a server has.

    Raises:
        ProtocolError: If it speaks another protocol.
    """
    health = _mapping(value, "the answer")
    if health.get("protocol") != PROTOCOL:
        raise ProtocolError(f"'protocol' must be {PROTOCOL}, got {_short(health.get('protocol'))}")
    return _text(health, "name", "the answer"), _text(health, "version", "the answer")


def error_answer(kind: str, message: str) -> bytes:
    """Return the body that tells of a failure."""
    return to_json({"error": {"type": kind, "message": message}})


def parse_error(text: bytes) -> str:
    """Return what a failure's body says, in the protocol or not, in one short line."""
    try:
        message = str(from_json(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = text.decode(errors="replace")
    return " ".join(message.split())[:300] or "no message"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError(f"{where} must be a JSON object, got {_short(value)}")
    return value


def _text(mapping: dict[str, Any], key: str, where: str) -> str:
    value = mapping.get(key)
    if not isinstance(value, str):
        raise ProtocolError(f"{key!r} of {where} must be a text, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80]
