"""Sets as plain tensors, and overlays that show other pixels without changing any."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import imageset
from datamodules.imageset import UNLABELLED, Batch, ImageSet, Overlay, fingerprint, labelled, put_rows
from datamodules.store import load_tensors
from tests.helpers import refused, some_images


def invert(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
    return 255 - images


def brighten_by_id(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
    return images + (ids % 7).to(torch.uint8)[:, None, None, None]


def vandal(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
    """Not pure: writes into all that it is given."""
    images.zero_()
    ids.zero_()
    for extra in extras.values():
        extra.zero_()
    return images


def whole(images: ImageSet) -> Batch:
    return images.__getitems__(torch.arange(len(images)))


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.fixture
def base() -> ImageSet:
    plain = some_images(12, (3, 4, 5))
    return ImageSet(plain.images, plain.labels, plain.ids, {"boxes": torch.arange(48.0).view(12, 4)})


def test_which_samples_have_a_label() -> None:
    assert labelled(torch.tensor([0, UNLABELLED, 3])).tolist() == [True, False, True]
    assert labelled(torch.tensor([[0.0, 0.5], [0.0, 0.0], [1.0, 0.0]])).tolist() == [True, False, True]


# --- fetching ---------------------------------------------------------------------------------------------------------
def test_fetching_rows_is_indexing(base: ImageSet) -> None:
    rows = [7, 0, 7, 11]
    batch = base.__getitems__(rows)
    assert isinstance(batch, Batch)
    assert same(batch, Batch(base.images[rows], base.labels[rows], base.ids[rows]))
    assert same(base.__getitems__(torch.tensor(rows)), batch)
    assert len(base.__getitems__([]).images) == 0
    assert (len(base), base.image_shape) == (12, (3, 4, 5))
    assert torch.equal(base.extras_at(torch.tensor(rows))["boxes"], base.extras["boxes"][rows])


def test_one_row_counted_from_either_end(base: ImageSet) -> None:
    for row in (0, 11, -1, -12):
        image, label, sample = base[row]
        assert torch.equal(image, base.images[row])
        assert (int(label), int(sample)) == (int(base.labels[row]), int(base.ids[row]))
    for row in (12, -13):
        with pytest.raises(IndexError):
            base[row]


def test_a_fetched_batch_is_a_copy(base: ImageSet) -> None:
    before = fingerprint(base.images, base.labels, base.ids)
    for part in base.__getitems__([1, 2]):
        part.zero_()
    for part in base.select(torch.tensor([1, 2])).__getitems__([0, 1]):
        part.zero_()
    assert fingerprint(base.images, base.labels, base.ids) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_dataloader_fetches_whole_batches(base: ImageSet, workers: int) -> None:
    loader = DataLoader(base, batch_size=5, collate_fn=lambda batch: batch, num_workers=workers)
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [5, 5, 2]
    assert all(isinstance(batch, Batch) for batch in batches)
    assert same(Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True))), whole(base))


# --- errors -----------------------------------------------------------------------------------------------------------
def test_what_does_not_fit_together_is_refused(base: ImageSet) -> None:
    images, labels, ids = base.images, base.labels, base.ids
    with refused("images", "uint8", "float32"):
        ImageSet(images.float(), labels, ids)
    with refused("images", "(12, 4, 5)"):
        ImageSet(images[:, 0], labels, ids)
    with refused("labels", "int32"):
        ImageSet(images, labels.int(), ids)
    with refused("labels", "(12, 1)"):
        ImageSet(images, labels[:, None], ids)
    with refused("labels", "float32 (12,)"):
        ImageSet(images, labels.float(), ids)
    with refused("ids", "int32"):
        ImageSet(images, labels, ids.int())
    with refused("12 images", "11 labels", "12 ids"):
        ImageSet(images, labels[1:], ids)
    with refused("12 images", "11 ids"):
        ImageSet(images, labels, ids[1:])
    with refused("boxes", "3 rows", "12 images"):
        ImageSet(images, labels, ids, {"boxes": torch.zeros(3, 4)})
    rows = torch.arange(12)
    with refused("key"):
        Overlay(base, rows, rewriter=invert)
    with refused("12 images", "3 labels"):
        Overlay(base, rows, labels=labels[:3])
    with refused("12 images", "3 ids"):
        Overlay(base, rows, ids=ids[:3])


def test_soft_labels_and_missing_labels_are_labels(base: ImageSet) -> None:
    soft = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ImageSet(base.images, soft, base.ids)[3].labels, soft[3])
    assert torch.equal(base.select(torch.arange(12)).labels, base.labels)
    unlabelled = Overlay(base, torch.arange(12), labels=torch.full((12,), UNLABELLED))
    assert unlabelled.__getitems__([4]).labels.tolist() == [-1]
    relabelled = Overlay(base, torch.arange(12), labels=soft)
    assert torch.equal(relabelled.__getitems__([4]).labels, soft[[4]])


# --- overlays ---------------------------------------------------------------------------------------------------------
def test_an_overlay_shows_rows_relabelled_renamed_and_rewritten(base: ImageSet) -> None:
    rows = torch.tensor([3, 3, 0, 9, 5])
    labels, ids = torch.tensor([1, 2, 3, 0, 1]), torch.tensor([500, 501, 502, 503, 504])
    changed = torch.tensor([True, False, True, False, True])
    overlay = Overlay(base, rows, labels=labels, ids=ids, changed=changed, rewriter=invert, key="invert")
    expected = base.images[rows].clone()
    expected[changed] = 255 - expected[changed]
    assert (len(overlay), overlay.image_shape) == (5, (3, 4, 5))
    assert same(whole(overlay), Batch(expected, labels, ids))
    assert same(overlay.__getitems__([4, 0, 3]), Batch(expected[[4, 0, 3]], labels[[4, 0, 3]], ids[[4, 0, 3]]))
    assert torch.equal(overlay[-1].images, expected[-1])
    assert torch.equal(overlay.extras_at(torch.tensor([1, 4]))["boxes"], base.extras["boxes"][[3, 5]])


def test_by_default_a_rewriter_changes_every_row_and_nothing_else_changes(base: ImageSet) -> None:
    overlay = Overlay(base, torch.arange(12), rewriter=invert, key="invert")
    assert same(whole(overlay), Batch(255 - base.images, base.labels, base.ids))


def test_a_rewriter_gets_the_ids_of_its_own_set_and_the_extras_of_its_rows(base: ImageSet) -> None:
    seen: list[tuple[list[int], Tensor]] = []

    def look(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        seen.append((ids.tolist(), extras["boxes"]))
        return images

    changed = torch.tensor([True, False, True])
    rows = torch.tensor([5, 6, 7])
    Overlay(base, rows, ids=torch.tensor([90, 91, 92]), changed=changed, rewriter=look, key="").__getitems__([2, 1, 0])
    assert seen[0][0] == [90, 92]
    assert torch.equal(seen[0][1], base.extras["boxes"][[5, 7]])


@pytest.mark.parametrize("kept", [0, 2**28])
def test_rewritten_images_are_the_same_whether_they_are_kept_or_made_anew(
    base: ImageSet, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imageset, "KEPT", kept)
    calls: list[int] = []

    def counted(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        calls.append(len(ids))
        return brighten_by_id(images, ids, extras)

    changed = torch.arange(12) % 3 == 0
    overlay = Overlay(base, torch.arange(11, -1, -1), changed=changed, rewriter=counted, key="")
    expected = base.images.flip(0)
    expected[changed] += (base.ids.flip(0)[changed] % 7).to(torch.uint8)[:, None, None, None]
    for rows in ([0, 1, 2, 3], [9, 9, 4], [1, 2], list(range(12))):
        assert torch.equal(overlay.__getitems__(rows).images, expected[rows])
    assert calls == ([4] if kept else [2, 2, 4])  # rows 0, 3; two of row 9; 0, 3, 6, 9


def test_a_rewriter_is_not_called_where_nothing_changed(base: ImageSet) -> None:
    def never(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        raise AssertionError("called for unchanged rows")

    changed = torch.zeros(12, dtype=torch.bool)
    Overlay(base, torch.arange(12), changed=changed, rewriter=never, key="").__getitems__([1, 2, 3])


@pytest.mark.parametrize("rewriter", [invert, vandal])
def test_the_base_keeps_its_bytes_whatever_a_rewriter_does(base: ImageSet, rewriter) -> None:  # type: ignore[no-untyped-def]
    tensors = (base.images, base.labels, base.ids, base.extras["boxes"])
    before = fingerprint(*tensors)
    inner = Overlay(base, torch.arange(12), rewriter=rewriter, key="r")
    outer = Overlay(inner, torch.arange(12), rewriter=rewriter, key="r")
    for images in (inner, outer):
        ids = images.ids.clone()
        whole(images)
        images.__getitems__([0, 0, 5])
        assert torch.equal(images.ids, ids)
    assert fingerprint(*tensors) == before


def test_selections_of_selections(base: ImageSet) -> None:
    one = base.select(torch.tensor([8, 6, 4, 2, 0]))
    two = one.select(torch.tensor([4, 0, 0, 2]))
    rows = [0, 8, 8, 4]
    assert same(whole(two), base.__getitems__(rows))
    assert torch.equal(two.extras_at(torch.arange(4))["boxes"], base.extras["boxes"][rows])
    assert two.base is base  # one look-up, however deep
    # what the first selection relabelled stays relabelled, and a rewriter is not skipped
    renamed = Overlay(base, torch.arange(5), labels=torch.full((5,), 3), ids=torch.arange(50, 55))
    assert renamed.select(torch.tensor([1, 4])).ids.tolist() == [51, 54]
    assert renamed.select(torch.tensor([1, 4])).labels.tolist() == [3, 3]
    inverted = Overlay(base, torch.arange(12), rewriter=invert, key="invert")
    assert torch.equal(whole(inverted.select(torch.tensor([2]))).images, 255 - base.images[[2]])


def test_overlays_compose_from_the_inside_out(base: ImageSet) -> None:
    inner = Overlay(base, torch.arange(12), rewriter=brighten_by_id, key="a")
    rows = torch.tensor([11, 3, 3])
    changed = torch.tensor([True, True, False])
    outer = Overlay(inner, rows, ids=torch.tensor([1, 2, 3]), changed=changed, rewriter=invert, key="b")
    once = base.images[rows] + (base.ids[rows] % 7).to(torch.uint8)[:, None, None, None]
    assert torch.equal(whole(outer).images, torch.stack([255 - once[0], 255 - once[1], once[2]]))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 1, 1), (3, 4, 4), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rows_are_put_in_words_or_in_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    images, new = some_images(9, shape).images.to(dtype), some_images(3, shape, seed=1).images.to(dtype)
    rows = torch.tensor([8, 0, 3])
    expected = images.clone()
    expected[rows] = new
    assert put_rows(images, rows, new) is images
    assert torch.equal(images, expected)
    # of a slice, and from a strided tensor
    padded = torch.zeros(3, *shape[:2], shape[2] + 2, dtype=dtype)
    padded[..., 1:-1] = new
    part = some_images(9, shape).images.to(dtype)[2:]
    whole = part.clone()
    whole[[0, 6, 1]] = new
    assert torch.equal(put_rows(part, torch.tensor([0, 6, 1]), padded[..., 1:-1]), whole)
    unaligned = torch.empty(new.numel() + 3, dtype=dtype)[3:].view(new.shape).copy_(new)
    assert torch.equal(put_rows(part, torch.tensor([0, 6, 1]), unaligned), whole)


def test_a_rewriter_that_changes_shape_or_type_is_an_error(base: ImageSet) -> None:
    def wrong(result: Tensor) -> Overlay:
        return Overlay(base, torch.arange(12), rewriter=lambda images, ids, extras: result, key="")

    for result in (
        torch.zeros(1, 3, 4, 5, dtype=torch.uint8),  # would be spread over all rows
        torch.zeros(12, 1, 4, 5, dtype=torch.uint8),
        torch.zeros(12, 3, 5, 4, dtype=torch.uint8),
        torch.zeros(12, 3, 4, 5, dtype=torch.int8),
        torch.zeros(12, 3, 4, 5),
    ):
        with pytest.raises(ValueError, match="for 12 rows of"):
            whole(wrong(result))


# --- digests ----------------------------------------------------------------------------------------------------------
def test_the_digest_of_a_set_is_of_all_that_it_holds(base: ImageSet) -> None:
    def digest(
        images: Tensor = base.images, labels: Tensor = base.labels, ids: Tensor = base.ids, **extras: Tensor
    ) -> str:
        return ImageSet(images, labels, ids, extras).digest()

    pixel, label, sample = base.images.clone(), base.labels.clone(), base.ids.clone()
    pixel[11, 2, 3, 4] ^= 1
    label[5] = 3
    sample[5] = 999
    boxes = torch.zeros(12, 4)
    found = [
        digest(),
        digest(images=pixel),
        digest(labels=label),
        digest(ids=sample),
        digest(images=base.images.view(12, 3, 5, 4)),
        digest(labels=torch.zeros(12, 4)),
        digest(boxes=boxes),
        digest(boxes=boxes + 1),
        digest(others=boxes),
    ]
    assert len(set(found)) == len(found)
    assert digest() == digest(images=base.images.clone())
    assert len(digest()) == 64


def test_the_digest_of_an_overlay_is_of_all_that_it_changes(base: ImageSet) -> None:
    other = some_images(12, (3, 4, 5), seed=1)
    rows, some = torch.arange(12), torch.arange(12) < 6

    def digest(
        base: ImageSet = base, rows: Tensor = rows, changed: Tensor | None = some, key: str = "k", **new: Tensor
    ) -> str:
        return Overlay(base, rows, changed=changed, rewriter=invert, key=key, **new).digest()

    found = [
        digest(),
        digest(base=other),
        digest(rows=rows.flip(0), labels=base.labels, ids=base.ids),
        digest(labels=base.labels.flip(0)),
        digest(ids=base.ids + 100),
        digest(changed=~some),
        digest(changed=None),
        digest(key="K"),
        base.select(rows).digest(),
        base.digest(),
    ]
    assert len(set(found)) == len(found)
    assert digest() == digest(changed=some.clone())
    inner = Overlay(base, rows, rewriter=invert, key="a")
    assert inner.select(rows).digest() != Overlay(base, rows, rewriter=invert, key="b").select(rows).digest()


def test_a_known_digest_is_taken_as_it_is(base: ImageSet) -> None:
    stored = ImageSet(base.images, base.labels, base.ids, digest="known")
    assert stored.digest() == "known"
    assert stored.select(torch.arange(12)).digest() == fingerprint(
        "known", torch.arange(12), base.labels, base.ids, "none", None
    )


def test_a_fingerprint_keeps_types_shapes_and_borders_apart() -> None:
    zeros = torch.zeros(4, dtype=torch.uint8)
    parts = [
        (zeros,),
        (zeros.view(2, 2),),
        (zeros.view(torch.int32),),
        (zeros.bool(),),
        (zeros[:2], zeros[:2]),
        (torch.empty(0),),
        (torch.empty(0, 2),),
        (),
        ("ab",),
        ("a", "b"),
        ("a||b",),
        (1,),
        ("1",),
        (torch.tensor(1),),
        (torch.zeros(2, dtype=torch.bfloat16),),
    ]
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    column = torch.arange(12, dtype=torch.uint8).view(3, 4).t()
    assert fingerprint(column) == fingerprint(column.contiguous())
    assert fingerprint("a", 1) == hashlib.sha256(b"|'a'||1|").hexdigest()


# --- elsewhere --------------------------------------------------------------------------------------------------------
def test_moving_keeps_bytes_digest_and_view(base: ImageSet) -> None:
    changed = torch.arange(12) % 3 == 0
    overlay = Overlay(base, torch.arange(12), ids=torch.arange(12), changed=changed, rewriter=brighten_by_id, key="b")
    nested = overlay.select(torch.tensor([9, 3, 1]))
    for images in (base, overlay, nested):
        expected = images.digest()
        moved = images.to("cpu")
        assert type(moved) is type(images)
        assert same(whole(moved), whole(images))
        assert moved.digest() == expected
        assert moved._fingerprint() == expected
        assert torch.equal(moved.extras_at(torch.tensor([1]))["boxes"], images.extras_at(torch.tensor([1]))["boxes"])


def test_every_tensor_moves(base: ImageSet) -> None:
    overlay = Overlay(base, torch.arange(12), changed=torch.arange(12) < 5, rewriter=invert, key="i")
    moved = overlay.to("meta")
    assert moved.changed is not None
    tensors = [moved.rows, moved.labels, moved.ids, moved.changed, moved.base.images, moved.base.labels, moved.base.ids]
    assert {tensor.device.type for tensor in [*tensors, *moved.base.extras.values()]} == {"meta"}
    assert base.images.device.type == "cpu"


def test_an_overlay_on_a_memory_map_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = some_images(32, (3, 6, 6))
    path = tmp_path / "images.safetensors"
    save_file({"images": plain.images, "labels": plain.labels}, path)
    before = path.read_bytes()
    mapped = load_tensors(path)
    base = ImageSet(mapped["images"], mapped["labels"], plain.ids)
    for rewriter in (invert, vandal):
        overlay = Overlay(base, torch.arange(32).repeat(2), rewriter=rewriter, key="r")
        assert len(whole(overlay.select(torch.arange(64))).images) == 64
    assert torch.equal(whole(Overlay(base, torch.arange(32), rewriter=invert, key="i")).images, 255 - plain.images)
    assert base.digest() == plain.digest()
    assert torch.equal(base.images, plain.images)
    assert path.read_bytes() == before
