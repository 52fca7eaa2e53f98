"""Batches of judgements: order, dealing, resuming, latents, and the data module."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.data.preference_file import PreferenceFile
from lit_align.data.preference_loader import DecodedPreferences
from lit_align.data.preference_records import (
    append_record,
    pair_record,
    ranking_record,
    rating_record,
)
from lit_align.data.preferences import PreferenceDataModule, PreferenceLoader
from lit_align.data.prompts import PromptDataModule, PromptFile
from tests.data.test_preference_files import items, png

COUNT = 10


@pytest.fixture
def path(tmp_path):
    """A file of ten pairs of 8 x 8 images, the first preferred, with 6 prompts."""
    for level in range(COUNT + 1):
        (tmp_path / f"{level}.png").write_bytes(png(level))
    for i in range(COUNT):
        record = pair_record(id=str(i), prompt=f"prompt {i % 6}", items=items(i, i + 1),
                             label=(1, 0), weight=1 + i)  # fmt: skip
        append_record(tmp_path / "pairs.jsonl", record)
    return str(tmp_path / "pairs.jsonl")


def loader(path, batch_size=4, shuffle=True, **options):
    data = DecodedPreferences(PreferenceFile(path))
    return PreferenceLoader(data, batch_size, shuffle=shuffle, **options)


def ids(batches):
    return [batch.record_ids.tolist() for batch in batches]


def test_a_batch_holds_what_the_file_says(path):
    (batch,) = loader(path, 10, shuffle=False)
    assert batch.images.shape == (10, 2, 3, 8, 8)
    levels = (batch.images.mean(dim=(2, 3, 4)) * 255).round()
    assert levels.tolist() == [[i, i + 1] for i in range(COUNT)]
    assert batch.labels.tolist() == [[1, 0]] * COUNT
    assert batch.weights.tolist() == [1 + i for i in range(COUNT)]
    assert batch.prompts[7] == "prompt 1"
    assert batch.positions.tolist() == batch.record_ids.tolist() == list(range(COUNT))
    assert batch.latents is None


def test_each_pass_has_its_order_and_positions_are_unique(path):
    one = loader(path, seed=3)
    assert len(one) == 2  # the last two of ten are dropped
    passes = [list(one) for _ in range(3)]
    assert ids(passes[0]) != ids(passes[1])
    for batches in passes:
        assert len({i for batch in ids(batches) for i in batch}) == 8
    positions = torch.cat([batch.positions for batches in passes for batch in batches])
    assert positions.tolist() == [*range(8), *range(10, 18), *range(20, 28)]
    again = loader(path, seed=3)
    again.set_epoch(1)
    assert ids(again) == ids(passes[1])
    again.set_epoch(0)
    assert ids(again) == ids(passes[0])
    assert ids(loader(path, seed=4)) != ids(passes[0])


def test_evaluation_keeps_the_order_and_the_rest(path):
    one = loader(path, shuffle=False)
    assert ids(one) == ids(one) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(one) == 3
    some = loader(path, shuffle=False, numbers=torch.tensor([2, 5, 9]).numpy())
    assert ids(some) == [[2, 5, 9]]
    assert [prompt for prompt, _ in some.prompts] == ["prompt 2", "prompt 5", "prompt 3"]


@pytest.mark.parametrize("shuffle", [True, False])
def test_two_processes_see_what_one_sees(path, shuffle):
    whole = list(loader(path, 4, shuffle, seed=1))
    parts = [list(loader(path, 2, shuffle, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, one, two in zip(whole, *parts, strict=True):
        for name in ("record_ids", "positions", "weights"):
            dealt = torch.stack([getattr(one, name), getattr(two, name)], dim=1).flatten()
            assert torch.equal(getattr(batch, name), dealt)


def test_uneven_evaluation_repeats_the_last_with_weight_zero(path):
    """Ten judgements for three processes in twos: 6, then 4 of which two places are left."""
    parts = [list(loader(path, 2, False, rank=rank, world_size=3)) for rank in range(3)]
    assert [ids(part) for part in parts] == [[[0, 3], [6, 9]], [[1, 4], [7, 9]], [[2, 5], [8, 9]]]
    assert [part[1].weights.tolist() for part in parts] == [[7, 10], [8, 0], [9, 0]]


def test_state_continues_in_the_middle_of_a_pass(path):
    one = loader(path, 2)
    list(one)
    running = iter(one)
    first = [next(running), next(running)]
    state = one.state_dict()
    rest = list(running)
    resumed = loader(path, 2)
    resumed.load_state_dict(state)
    for a, b in zip(rest, resumed, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.images, b.images)
    assert ids(resumed) == ids(one)  # the pass after
    assert len(first) + len(rest) == len(one)
    finished = one.state_dict()
    resumed.load_state_dict(finished)
    assert ids(resumed) == ids(one)


def test_a_state_of_other_data_or_batches_is_refused(path):
    one = loader(path, 2)
    next(iter(one))
    state = one.state_dict()
    with pytest.raises(ValueError, match="batches of 2 judgements .* but now they have 3"):
        loader(path, 3).load_state_dict(state)
    loader(path, 1, world_size=2).load_state_dict(state)
    append_record(path, pair_record(id="x", prompt="p", items=items(0, 1), label=(1, 0)))
    with pytest.raises(ValueError, match=r"judgements \(11\) are not those .* made with \(10\)"):
        loader(path, 2).load_state_dict(state)


def test_too_few_judgements_are_refused(path):
    with pytest.raises(ValueError, match=r"10 judgement.* on 2 process.*set `batch_size: 5`"):
        loader(path, 6, world_size=2)
    with pytest.raises(ValueError, match=r"too few .* on 11 process.*; give more"):
        loader(path, 1, world_size=11)


def test_workers_decode_the_same_and_leave_the_global_generator_alone(path):
    before = torch.random.get_rng_state()
    alone, helped = list(loader(path)), list(loader(path, num_workers=2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.record_ids, b.record_ids)


def test_rankings_of_unequal_length_are_filled(path, tmp_path):
    file = tmp_path / "r.jsonl"
    append_record(file, ranking_record(id="1", prompt="p", items=items(0, 1, 2), rank=(2, 1, 2)))
    append_record(file, pair_record(id="2", prompt="q", items=items(3, 4), label=(0, 1)))
    data = DecodedPreferences(PreferenceFile(file, unit="rankings"))
    (batch,) = PreferenceLoader(data, 2)
    assert batch.labels.tolist() == [[1, 2, 2], [1, 2, 0]]
    levels = (batch.images.mean(dim=(2, 3, 4)) * 255).round()
    assert levels.tolist() == [[1, 0, 2], [4, 3, 0]]


def test_single_images(path, tmp_path):
    file = tmp_path / "r.jsonl"
    append_record(file, rating_record(id="1", prompt="p", item=items(3)[0], liked=False))
    (batch,) = PreferenceLoader(DecodedPreferences(PreferenceFile(file, unit="ratings")), 4)
    assert batch.images.shape == (1, 1, 3, 8, 8)
    assert batch.labels.tolist() == [[0]]


def test_images_of_unlike_sizes_and_broken_ones_are_told(path, tmp_path):
    (tmp_path / "3.png").write_bytes(png(3, size=(8, 4)))
    with pytest.raises(ValueError, match=r"line 3: pictures of shapes .* set `image_size`"):
        list(loader(path, shuffle=False))
    scaled = DecodedPreferences(PreferenceFile(path), image_size=4)
    assert next(iter(PreferenceLoader(scaled, 10))).images.shape == (10, 2, 3, 4, 4)
    (tmp_path / "3.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"line 3: '.*3.png' cannot be used: it cannot be deco"):
        list(loader(path, shuffle=False))


class Recorder(LightningModule):
    """Records what it is given; one weight that learns from it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.loader = [], [], None

    def experience(self, loader):
        self.loader = loader
        return loader

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.record_ids.tolist(), batch.positions.tolist()))
        return self.weight * batch.labels.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(path, steps, tmp_path, checkpoint=None, every=None, **options):
    module = Recorder()
    callbacks = [ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=every,
                                 save_last=False)] if every else []  # fmt: skip
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, enable_checkpointing=bool(every),
        num_sanity_val_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    data = PreferenceDataModule(path, batch_size=2, val_fraction=0.75, **options)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_one_without_a_break(path, tmp_path, workers):
    """Checkpoints in the middle of a pass, at its end, and in the middle of the next."""
    whole = fit(path, 10, tmp_path, every=1, num_workers=workers)
    per_pass = len(whole.loader)
    assert per_pass == 3  # of seven judgements, in twos
    positions = [p for _, batch in whole.seen for p in batch]
    size = len(whole.loader.numbers)
    assert positions == [lap * size + i for lap in range(4) for i in range(6)][:20]
    for step in (1, 2, 3, 5) if workers == 0 else (2,):
        resumed = fit(path, 10, tmp_path, tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], step


@pytest.mark.filterwarnings("ignore")
def test_held_out_judgements_are_validated_on_and_given_to_the_method(path, tmp_path):
    module = fit(path, 4, tmp_path)
    held_out = [i for batch in ids(module.loader.held_out) for i in batch]
    assert {i for batch in module.validated for i in batch.record_ids.tolist()} == set(held_out)
    trained = {i for batch, _ in module.seen for i in batch}
    assert trained.isdisjoint(held_out)
    assert module.loader.data.file is module.loader.held_out.data.file


@pytest.mark.filterwarnings("ignore")
def test_with_prompts_evaluation_is_of_prompts(path, tmp_path):
    prompts = PromptDataModule("shapes-train", "shapes-heldout", val_size=3, batch_size=3)
    module = fit(path, 4, tmp_path, prompts=prompts)
    assert module.validated[-1].prompts == [text for text, _ in PromptFile("shapes-heldout")[:3]]
    assert len(module.loader.held_out) > 0
    data = PreferenceDataModule(path, prompts=prompts)
    data.setup("test")
    assert len(data.test_dataloader()) == -(-len(PromptFile("shapes-heldout")) // 3)


class LatentRecorder(Recorder):
    """Its latents are the means of the channels."""

    encoded = 0

    def encode_images(self, images):
        self.encoded += len(images)
        return images.mean(dim=(2, 3))

    def latents_key(self):
        return "mean"

    def training_step(self, batch, batch_idx):
        assert batch.images.shape == (len(batch), 2, 0)
        self.seen.append((batch.record_ids, batch.latents))
        return self.weight * batch.latents.sum()


@pytest.mark.filterwarnings("ignore")
def test_latents_are_encoded_once_and_given_in_the_images_place(path, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Recorder", LatentRecorder)
    cache = tmp_path / "cache"
    module = fit(path, 4, tmp_path, cache_latents=str(cache))
    assert module.encoded == COUNT + 1  # images, most of which lie in two pairs
    for record_ids, latents in module.seen:
        levels = torch.stack([record_ids, record_ids + 1], dim=1)
        assert torch.equal((latents * 255).round().long(), levels[..., None].expand(-1, -1, 3))
    assert module.validated[0].latents.shape[1:] == (2, 3)
    assert len(list(cache.iterdir())) == 1  # no partial file is left
    again = fit(path, 4, tmp_path, cache_latents=str(cache))
    assert again.encoded == 0
    assert torch.equal(again.seen[0][1], module.seen[0][1])
    monkeypatch.setattr(LatentRecorder, "latents_key", lambda self: "other")
    assert fit(path, 2, tmp_path, cache_latents=str(cache)).encoded == COUNT + 1


@pytest.mark.filterwarnings("ignore")
def test_an_encoding_that_broke_off_leaves_nothing(path, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Recorder", LatentRecorder)
    (tmp_path / "9.png").write_bytes(png(9, size=(4, 4)))
    with pytest.raises(ValueError, match=r"pictures of shapes .* set `image_size`"):
        fit(path, 2, tmp_path, cache_latents=str(tmp_path / "cache"))
    (tmp_path / "9.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"line 9: '.*9.png' cannot be used"):
        fit(path, 2, tmp_path, cache_latents=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_options_that_cannot_work_are_refused(path, tmp_path):
    for options, told in (
        ({"batch_size": 0}, "`batch_size` must be positive, got 0"),
        ({"image_size": 0}, "`image_size` must be positive, got 0"),
        ({"image_size": (8, 0)}, "`image_size` must be positive, got 0"),
        ({"val_fraction": 1.0}, r"`val_fraction` must lie in \[0, 1\), got 1.0"),
        ({"val": path, "val_fraction": 0.1}, "Set `val` or `val_fraction`, not both"),
        ({"cache_latents": "x", "num_frames": 2}, "set `num_frames: 1`"),
        ({"unit": "triples"}, "`unit` must be one of 'pairs'"),
    ):
        with pytest.raises(ValueError, match=told):
            PreferenceDataModule(path, **options)
    with pytest.raises(ValueError, match="no judgements to validate on; set `val`"):
        PreferenceDataModule(path).setup("validate")
    with pytest.raises(ValueError, match="`val_fraction` 0.1 holds out none of the 10 judgements"):
        PreferenceDataModule(path, val_fraction=0.1).setup("fit")
    with pytest.raises(ValueError, match="too few"):
        PreferenceDataModule(path, batch_size=11).setup("fit")
    with pytest.raises(ValueError, match="`cache_latents` is set, but Recorder does not learn"):
        fit(path, 2, tmp_path, cache_latents="x")


def test_without_a_trainer_the_loaders_are_plain(path):
    data = PreferenceDataModule(path, val=path, batch_size=5)
    data.setup("fit")
    assert isinstance(data.train_dataloader(), PreferenceLoader)
    assert ids(data.val_dataloader()) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
