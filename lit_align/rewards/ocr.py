"""Does the image show the text that its prompt asks for? Recognizers read, `OCR` compares.

    score = 1 - min(d, |t|) / |t|,  d the edit distance of what was read and the target t

Both without white space and in lower case, as in Flow-GRPO (arXiv:2505.05470).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lit_align.hub import opening
from lit_align.rewards.base import Metadata, RewardModule, uint8_images

_QUOTED = re.compile(r'"([^"]*)"')
_END_OF_TURN = "<|im_end|>"


class Recognizer(Protocol):
    """What `OCR` asks of its recognizer."""

    def __call__(self, images: Tensor) -> Sequence[str | None]:
        """Return the text in each image.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Returns:
            B texts, the lines in reading order; empty if an image shows none, None if it could
            not be read.
        """


class OCR(RewardModule):
    """How much of the wanted text an image shows, in [0, 1].

    Wanted is ``metadata["text"]``, else what stands between the first two double quotes of the
    prompt; a prompt that asks for no text gets NaN, and an image without any text 0.

    As in Flow-GRPO an image that contains the target among other text gets 1, so that writing it
    many times over costs nothing; `exact` counts all other text as errors.

    Args:
        recognizer: See `Recognizer`; by default a `RapidOCRRecognizer`.
        exact: Whether other text in the image costs.
    """

    needs_prompt = True

    def __init__(self, recognizer: nn.Module | None = None, exact: bool = False) -> None:
        super().__init__()
        recognizer = RapidOCRRecognizer() if recognizer is None else recognizer
        self.recognizer = recognizer.requires_grad_(False)
        self.exact = exact
        self.eval()

    @property
    def name(self) -> str:
        """OCR or OCR-exact."""
        return "OCR-exact" if self.exact else "OCR"

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores [B]; see the base class."""
        metadata = metadata or [None] * len(prompts)
        targets = [wanted_text(p, known) for p, known in zip(prompts, metadata, strict=True)]
        scores = torch.full((len(images),), torch.nan)
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        rows = [i for i, target in enumerate(targets) if target and finite[i]]
        if rows:
            for row, text in zip(rows, self._read(images[rows]), strict=True):
                if text is not None:
                    scores[row] = text_match(text, targets[row] or "", self.exact)
        return scores.to(images.device)

    def _read(self, images: Tensor) -> Sequence[str | None]:
        """Return the texts, after a check of the recognizer's answer."""
        read: Recognizer = self.recognizer
        texts = read(images)
        if len(texts) != len(images):
            raise ValueError(
                f"The recognizer {type(self.recognizer).__name__} must return one text or None per "
                f"image, got {len(texts)} for {len(images)} images."
            )
        return texts


class RapidOCRRecognizer(nn.Module):
    """The networks of PaddleOCR by RapidOCR, on the CPU; the extra `ocr`.

    The wheel of rapidocr brings small networks for Latin and Chinese script, so that nothing is
    fetched. An image of 512 x 512 takes 0.2 s on two cores.

    Args:
        engine: Use this `rapidocr.RapidOCR` instead of the default one.

    Raises:
        ImportError: If the extra is not installed.
    """

    def __init__(self, engine: Any = None) -> None:
        super().__init__()
        self.engine = _rapidocr() if engine is None else engine

    def forward(self, images: Tensor) -> list[str | None]:
        """Return the texts of images [B, 3, H, W]; see `Recognizer`."""
        # The engine takes OpenCV's order of channels.
        pixels = uint8_images(images).flip(dims=[-1])
        return [" ".join(self.engine(image.numpy()).txts or ()) for image in pixels]


class GOTOCRRecognizer(nn.Module):
    """GOT-OCR 2.0 of transformers, which writes down what it sees (arXiv:2409.01704).

    Args:
        pretrained: A hub id or folder.
        max_new_tokens: The text is cut after as many.
        batch_size: How many images the network sees at once.
        model: Use this network instead of `pretrained`, with `processor`.
        processor: Its processor.

    Raises:
        CheckpointError: If `pretrained` is not at hand.
        ValueError: If an option is out of its range, or a `model` has no `processor`.
    """

    def __init__(
        self,
        pretrained: str = "stepfun-ai/GOT-OCR-2.0-hf",
        max_new_tokens: int = 128,
        batch_size: int = 8,
        model: Any = None,
        processor: Any = None,
    ) -> None:
        super().__init__()
        for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{option}` must be at least 1, got {value}.")
        if model is None:
            with opening(pretrained, "model.safetensors"):
                processor = processor or AutoProcessor.from_pretrained(pretrained)
                model = AutoModelForImageTextToText.from_pretrained(
                    pretrained, dtype=torch.bfloat16
                )
        if processor is None:
            raise ValueError("A recognizer made of a `model` needs its `processor`.")
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def forward(self, images: Tensor) -> list[str | None]:
        """Return the texts of images [B, 3, H, W]; see `Recognizer`."""
        texts: list[str | None] = []
        for part in images.split(self.batch_size):
            texts += self._read(part)
        return texts

    @torch.no_grad()
    def _read(self, images: Tensor) -> list[str]:
        # As files hold them: the processor rescales integers.
        levels = list(uint8_images(images).permute(0, 3, 1, 2))
        inputs = self.processor(levels, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        tokens = self.model.generate(
            **inputs,
            do_sample=False,
            tokenizer=self.processor.tokenizer,
            stop_strings=_END_OF_TURN,
            max_new_tokens=self.max_new_tokens,
        )
        written = tokens[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.processor.batch_decode(written, skip_special_tokens=True)
        return [text.removesuffix(_END_OF_TURN) for text in texts]


def wanted_text(prompt: str, metadata: dict[str, Any] | None) -> str | None:
    """Return the text that an image of the prompt should show, None if there is none.

    Raises:
        TypeError: If ``metadata["text"]`` is no text.
    """
    if metadata and metadata.get("text") is not None:
        text = metadata["text"]
        if not isinstance(text, str):
            raise TypeError(
                f"The metadata 'text' of {prompt!r} must be a string, got {text!r}; join several."
            )
    else:
        quoted = _QUOTED.search(prompt)
        text = quoted[1] if quoted else ""
    return text if _plain(text) else None


def text_match(text: str, target: str, exact: bool = False) -> float:
    """Return 1 - min(d, |t|) / |t| of a read text and a target that is not blank, see the module.

    Args:
        text: What was read.
        target: What should be there.
        exact: If not, a text that contains the target gets 1.
    """
    read, wanted = _plain(text), _plain(target)
    if not exact and wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Return how many insertions, deletions and replacements turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    """Return the text without white space, in lower case."""
    return "".join(text.split()).lower()


def _rapidocr() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(
            'RapidOCRRecognizer needs rapidocr and onnxruntime: pip install "lit-align[ocr]"; '
            "or give OCR another recognizer, such as GOTOCRRecognizer."
        ) from error
    return RapidOCR(params={"Global.log_level": "error"})
