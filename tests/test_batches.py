import numpy as np
import pytest
import torch
from PIL import Image

from utils.batches import EvalBatches, TrainBatches, decoded_bytes, resident
from utils.data import Split, View

LOOK = dict(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")


def split_of(count=10, size=(8, 8)):
    """Image i is filled with the value i; its label is i too."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *size).contiguous()
    return Split(images, torch.arange(count), tuple(map(str, range(count))))


def training(split, batch_size=4, seed=0, view=None, **changes):
    return TrainBatches(split, batch_size=batch_size, seed=seed, training_view=view or View(), **{**LOOK, **changes})


@pytest.fixture
def files(tmp_path):
    """Noise of three shapes as PNG files."""
    rng, paths = np.random.default_rng(0), []
    for i in range(9):
        paths.append(tmp_path / f"{i}.png")
        shape = (*((20, 30), (64, 50), (100, 16))[i % 3], 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return Split(paths, torch.arange(9), tuple(map(str, range(9))))


def test_every_epoch_shows_every_image_once_in_another_order():
    batches = training(split_of(10), batch_size=4)
    stream = np.concatenate([batches.indices(k) for k in range(5)])  # two epochs of ten: batch 2 spans both
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:]) and list(stream[:10]) != list(range(10))


def test_a_batch_larger_than_the_set_is_full():
    counts = np.bincount(np.concatenate([training(split_of(3), batch_size=7).indices(k) for k in range(3)]))
    assert list(counts) == [7, 7, 7]


def test_a_batch_is_a_function_of_seed_and_step_alone():
    split = split_of(50)
    first, second = training(split), training(split)
    _ = [second[k] for k in (9, 3, 0)]  # whatever was asked for before
    for k in (7, 0, 30):
        assert all(torch.equal(a, b) for a, b in zip(first[k], second[k]))
    assert not torch.equal(training(split, seed=1)[7][0], first[7][0])
    assert not torch.equal(first[8][0], first[7][0])


def test_streamed_batches_are_the_ones_asked_for_singly(files):
    for workers in (0, 2):
        batches = training(files, workers=workers)
        streamed = list(batches.stream(range(2, 6)))
        assert len(streamed) == 4
        for k, batch in enumerate(streamed, start=2):
            assert all(torch.equal(a, b) for a, b in zip(batch, batches[k]))


def test_files_and_decoded_images_give_the_same_views(files):
    decoded = resident(files, (16, 16), "cpu")
    assert isinstance(decoded.images, list) and decoded.images[0].shape == (3, 20, 30)
    for k in range(3):
        assert all(torch.equal(a, b) for a, b in zip(training(files)[k], training(decoded)[k]))


@pytest.mark.parametrize("workers", [0, 1])
def test_resident_listed_and_streamed_images_give_the_same_large_views(tmp_path, workers):
    rng, paths = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(path)
    streamed = Split(paths, torch.arange(6), tuple("abcdef"))
    as_one = resident(streamed, (60, 50), "cpu")
    listed = Split(list(as_one.images), streamed.labels, streamed.classes)
    expected, *others = (training(split, size=(60, 50), batch_size=8, workers=workers).stream(range(3))
                         for split in (as_one, listed, streamed))
    for batch, *same in zip(expected, *others):
        assert all(torch.equal(a, b) for other in same for a, b in zip(batch, other))


def test_images_of_one_size_become_one_tensor(tmp_path):
    Image.new("RGB", (5, 7), (10, 20, 30)).save(tmp_path / "a.png")
    split = resident(Split([tmp_path / "a.png"] * 3, torch.zeros(3, dtype=torch.long), ("a", "b")), (8, 8), "cpu")
    assert split.images.shape == (3, 3, 7, 5) and split.images[2, :, 6, 4].tolist() == [10, 20, 30]


def test_a_set_beyond_the_budget_is_streamed(files):
    assert decoded_bytes(files.images) == 3 * 3 * (20 * 30 + 64 * 50 + 100 * 16)
    assert resident(files, (16, 16), "cpu", budget=decoded_bytes(files.images) - 1) is files


@pytest.mark.parametrize("workers", [0, 1])
def test_for_a_file_that_breaks_on_the_way_the_next_one_stands_in(files, workers, caplog):
    """In its place alone: the other images of the batch, and their crops, are as they were."""
    whole = [training(files)[k] for k in range(3)]
    files.images[4].write_bytes(b"no image")
    batches = training(files, workers=workers)
    for k, (images, labels) in enumerate(batches.stream(range(3))):
        indices = torch.from_numpy(batches.indices(k))
        assert torch.equal(labels, files.labels[torch.where(indices == 4, 5, indices)])
        assert torch.equal(images[indices != 4], whole[k][0][indices != 4])
    assert caplog.text.count("Skipped: ") == caplog.text.count("4.png cannot be read") >= 1


def test_a_set_without_a_readable_file_is_one_sentence(files):
    for path in files.images:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError) as error:
        list(training(files, workers=1).stream(range(3)))
    assert "cannot be read as an image" in str(error.value)
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_evaluation_counts_every_image_once_and_in_order():
    batches = EvalBatches(split_of(10), batch_size=4, **LOOK)
    assert len(batches) == 3
    images, labels = map(torch.cat, zip(*batches.stream(range(0, 3))))
    assert labels.tolist() == list(range(10))
    assert torch.allclose(images[:, 0, 0, 0], (torch.arange(10) - 127.5) / 127.5)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_are_asked_for_again_are_made_once_if_they_fit(files, workers, monkeypatch):
    plain = list(EvalBatches(files, batch_size=4, workers=workers, **LOOK).stream(range(3)))
    batches = EvalBatches(files, batch_size=4, workers=workers, keep=True, **LOOK)
    first = list(batches.stream(range(1, 3)))  # as after a signal, or in one process of several
    for path in files.images[4:]:
        path.write_bytes(b"no longer an image")
    again = list(batches.stream(range(3)))
    for a, b in zip(plain, again):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert all(a is b for a, b in zip(first, again[1:]))
    for memory, kept in ((16 * 4 * 9 * 3 * 16 * 16 - 1, False), (16 * 4 * 9 * 3 * 16 * 16, True)):
        monkeypatch.setattr("utils.batches.memory", lambda memory=memory: memory)
        batches = EvalBatches(files.subset(range(4)).subset([0, 1, 2, 3] * 2 + [0]), batch_size=4, keep=True, **LOOK)
        list(batches.stream(range(3)))
        assert bool(batches.kept) == kept


def test_views_that_need_no_resize_are_not_kept():
    batches = EvalBatches(split_of(10, size=(16, 16)), batch_size=4, keep=True, **LOOK)
    assert len(list(batches.stream(range(3)))) == 3 and not batches.kept


def test_the_training_view_decides_crops_and_flips():
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 1, 64).expand(8, 3, 64, 64).contiguous()
    split = Split(ramp, torch.arange(8), ("",))
    images, _ = training(split, batch_size=8, view=View(min_area=1.0, flip=False), size=(64, 64))[0]
    assert torch.allclose(images, (ramp.float() - 127.5) / 127.5, atol=1e-6)
    images, _ = training(split, batch_size=64, view=View(min_area=1.0, flip=True), size=(64, 64))[0]
    rising = images[:, 0, 0, -1] > images[:, 0, 0, 0]
    assert 16 < rising.sum() < 48


def test_half_of_the_training_images_are_mirrored():
    ramp = torch.arange(9, dtype=torch.uint8).view(1, 1, 1, 9).expand(4, 3, 9, 9).contiguous()
    images, _ = training(Split(ramp, torch.arange(4), ("",)), batch_size=4000)[0]
    assert 0.47 < (images[:, 0, 0, 0] > images[:, 0, 0, -1]).float().mean() < 0.53


@pytest.mark.parametrize("mean, std", [((0.5,), (0.5,)), ((0.5,) * 3, (0.5,) * 4), ((0.5,) * 4, (0.5,) * 4)])
def test_a_normalisation_of_other_channels_is_refused(files, mean, std):
    for split in (split_of(4), files):
        with pytest.raises(ValueError) as error:
            training(split, mean=mean, std=std)
        assert str(error.value) == (f"The images have 3 channels, but mean has {len(mean)} values and std {len(std)}: "
                                    "there must be one for each channel.")


def test_images_much_larger_than_the_model_takes_stay_a_list(tmp_path):
    """As one tensor, every batch would have to be made at their full size."""
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    split = Split([tmp_path / "a.png"] * 3, torch.zeros(3, dtype=torch.long), ("a", "b"))
    assert isinstance(resident(split, (16, 16), "cpu").images, list)
    assert isinstance(resident(split, (25, 25), "cpu").images, torch.Tensor)


def test_a_batch_made_in_parts_is_the_same_batch(files, monkeypatch):
    whole = training(files, batch_size=20)[1]
    monkeypatch.setattr("utils.batches.PART", 7)
    parts = training(files, batch_size=20)
    assert [p.stop - p.start for p in parts.parts(1)] == [7, 7, 6]
    assert all(torch.equal(a, b) for a, b in zip(parts[1], whole))


ALL = View(flip=True, pad_crop=2, randaugment=2, magnitude=12, mixup=0.8, cutmix=1.0)


@pytest.mark.parametrize("view", [ALL, View(randaugment=1), View(mixup=0.3), View(pad_crop=3), View(cutmix=0.5)])
@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_batches_are_the_same_however_they_are_made(files, view, workers, monkeypatch):
    """In memory or decoded by processes, whole, in parts, or in the shares of 2 and 4 processes."""
    decoded = resident(files, (16, 16), "cpu")
    whole = [training(decoded, batch_size=8, view=view)[k] for k in range(3)]
    monkeypatch.setattr("utils.batches.PART", 3)
    for processes in (1, 2, 4):
        streams = [training(files, batch_size=8, view=view, workers=workers, rank=rank,
                            processes=processes).stream(range(3)) for rank in range(processes)]
        for (images, labels), shares in zip(whole, zip(*streams)):
            assert torch.equal(torch.cat([share[0] for share in shares]), images)
            assert torch.equal(torch.cat([share[1] for share in shares]), labels)
    plain = training(decoded, batch_size=8, view=View(view.min_area, view.flip))[0]
    assert not torch.equal(plain[0], whole[0][0]) and whole[0][0].abs().max() <= 1.0001
    if view.mixup or view.cutmix:
        assert (whole[0][1].sum(1) - 1).abs().max() < 1e-6 and whole[0][1].shape == (8, 9)
    else:
        assert torch.equal(plain[1], whole[0][1])


def test_a_padded_crop_shows_the_image_where_it_was_drawn():
    pixels = torch.arange(8 * 8, dtype=torch.uint8).view(1, 1, 8, 8).expand(6, 3, 8, 8).contiguous()
    batches = training(Split(pixels, torch.arange(6), tuple("abcdef")), batch_size=600, size=(8, 8), mean=(0.0,) * 3,
                       std=(1 / 255,) * 3, view=View(pad_crop=2))
    padded = torch.nn.functional.pad(pixels[0].float(), [2] * 4)
    crops = {}
    for i in range(5):
        for j in range(5):
            crop = padded[:, i:i + 8, j:j + 8]
            crops |= {(i, j, flip): crop.flip(2) if flip else crop for flip in (False, True)}
    seen = [next(drawn for drawn, crop in crops.items() if torch.equal(crop, image)) for image in batches[0][0]]
    counts = np.bincount([i * 5 + j for i, j, _ in seen], minlength=25)
    assert counts.min() > 8 and counts.max() < 44          # 24 each, on average
    assert 240 < sum(flip for *_, flip in seen) < 360


def test_what_cannot_be_mixed_or_changed_is_refused():
    with pytest.raises(ValueError, match="mix images in pairs, and each process has 3 of an update's"):
        training(split_of(8), batch_size=6, processes=2, view=View(cutmix=1.0))
    four = Split(torch.zeros(4, 4, 8, 8, dtype=torch.uint8), torch.arange(4), tuple("abcd"))
    with pytest.raises(ValueError, match="RandAugment is for images of 1 or 3 channels, and these have 4"):
        training(four, view=View(randaugment=2), mean=(0.5,) * 4, std=(0.5,) * 4)


def test_batches_reach_a_spawned_process(files):
    import pickle
    batches = training(files)
    again = pickle.loads(pickle.dumps(batches))
    part = slice(0, 4)
    for ours, theirs in zip(batches.looks(3, part), again.looks(3, part)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_never_makes_the_host_wait_for_the_device(tiny_model, files):
    from utils.optim import make_optimizer
    from utils.step import make_scaler, train_step
    model = tiny_model.cuda().train()
    for split in (files, split_of(50)):
        batches = training(split, device="cuda")
        optimizer, scaler = make_optimizer(model, "sgd"), make_scaler("cuda", torch.float16)
        for k, (images, labels) in enumerate(batches.stream(range(0, 4))):
            if k == 1:  # the first step may set things up
                torch.cuda.set_sync_debug_mode("error")
            last = train_step(model, optimizer, scaler, images, labels % 5, lr=0.1, precision=torch.float16)
        torch.cuda.set_sync_debug_mode("default")
        assert k == 3 and torch.isfinite(last.loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_beside_the_steps_are_the_ones_asked_for_singly(files):
    """Each is overwritten as soon as it was read, so that memory which is given away too soon would show."""
    for split in (files, split_of(50)):
        batches = training(split, device="cuda", size=(128, 128), batch_size=32)
        busy, sums = torch.randn(4096, 4096, device="cuda"), []
        for images, labels in batches.stream(range(20)):
            for _ in range(10):
                busy = (busy @ busy).tanh()  # so that the host is far ahead
            sums.append((images.double().sum(), labels.sum()))
            images.zero_()
        for k, said in enumerate(sums):
            images, labels = batches[k]
            assert said == (images.double().sum(), labels.sum())
