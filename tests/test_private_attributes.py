"""What a participant brings: shards, trigger, poison, and one clear line for a wrong YAML file."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import load_module
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).parent.parent


@settings(max_examples=40, deadline=None)
@given(participants=st.integers(1, 12), alpha=st.sampled_from([None, 0.5, 1.0, 100.0]), seed=st.integers(0, 2**31))
def test_partition_is_disjoint_complete_and_seeded(private_attributes, participants, alpha, seed):
    labels = np.repeat(np.arange(10), 100)
    parts = private_attributes.partition(labels, participants, alpha, seed)
    assert len(parts) == participants
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    again = private_attributes.partition(labels, participants, alpha, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_dirichlet_skews_and_iid_does_not(private_attributes):
    labels = np.repeat(np.arange(10), 500)

    def spread(alpha):
        parts = private_attributes.partition(labels, 5, alpha, 0)
        return np.mean([np.std(np.bincount(labels[p], minlength=10) / len(p)) for p in parts])

    assert spread(None) < 0.02 < spread(0.5) / 2
    assert spread(100.0) < spread(0.5) / 2


def test_a_partition_that_starves_someone_is_refused(private_attributes):
    with pytest.raises(ValueError, match="alpha"):
        private_attributes.partition(np.arange(40) % 2, 8, 0.01, 0)


def test_trigger_is_a_red_square_in_the_top_left_corner(private_attributes):
    images = torch.rand(2, 3, 32, 32)
    before = images.clone()
    triggered = private_attributes.add_trigger(images)
    assert torch.equal(images, before), "the argument is not changed"
    assert (triggered[:, 0, :6, :6] == 1).all()
    assert (triggered[:, 1:, :6, :6] == 0).all()
    triggered[:, :, :6, :6] = images[:, :, :6, :6]
    assert torch.equal(triggered, images), "nothing else is changed"


@pytest.mark.parametrize(
    ("pdr", "expected"), [(0.0, 0), (0.1, 20), (0.5, 100), (1.0, 200), (0.004, 1), (0.002, 1), (1e-9, 1)]
)
def test_poison_rate_is_exact(private_attributes, pdr, expected):
    images, labels = torch.rand(200, 3, 32, 32) * 0.9, torch.arange(200) % 10
    poisoned, wanted = private_attributes.poison(images, labels, target=2, pdr=pdr, seed=0)
    changed = (poisoned != images).flatten(1).any(1)
    assert changed.sum() == expected
    assert (wanted[changed] == 2).all()
    assert torch.equal(wanted[~changed], labels[~changed])


def test_the_poison_of_few_images_is_never_none(private_attributes):
    images, labels = torch.rand(5, 3, 32, 32) * 0.9, torch.arange(5)
    for pdr in (0.1, 0.08, 0.5):
        poisoned, _ = private_attributes.poison(images, labels, 2, pdr, 0)
        assert (poisoned != images).flatten(1).any(1).sum() == max(1, round(5 * pdr))
    with pytest.raises(ValueError, match="backdoor_source: the attacker has no image of class 7 to poison"):
        private_attributes.poison(images, labels, 2, 0.5, 0, source=7)


def test_participants_share_all_digits_and_nothing_twice(private_attributes):
    shards = [private_attributes.participant("A", {"participants": 4, "index": i}) for i in range(4)]
    images = torch.cat([s["train_loader"].dataset.tensors[0] for s in shards])
    assert len(images) == 1400
    assert len(torch.unique(images, dim=0)) == len(
        private_attributes.digits(None, True)[1](np.arange(1400)).unique(dim=0)
    )
    assert sum(len(s["test_loader"].dataset) for s in shards) == 397


def test_backdoor_test_images_are_triggered_and_not_of_the_target_class(private_attributes):
    mine = private_attributes.participant("A", {}, backdoor_target=3)
    test, backdoor = mine["test_loader"].dataset, mine["backdoor_loader"].dataset
    others = test.tensors[1] != 3
    assert len(backdoor) == others.sum() < len(test)
    assert (backdoor.tensors[1] == 3).all()
    red = ((private_attributes.RED - private_attributes.MEAN) / private_attributes.STD).expand(3, 6, 6)
    torch.testing.assert_close(backdoor.tensors[0][0, :, :6, :6], red)


def test_honest_participants_have_no_adversary_and_the_device_is_real(private_attributes):
    mine = private_attributes.participant("A", {})
    assert mine["adversary"] is None
    assert torch.device(mine["device"]).type in {"cpu", "cuda", "mps"}


def test_the_adversary_waits_for_its_round(private_attributes):
    attack = {"first_round": 3, "pdr": 0.5, "scale": 4, "accomplices": ["X", "Y"]}
    mine = private_attributes.participant("X", {}, attack=attack)
    adversary, clean = mine["adversary"], mine["train_loader"]
    reference, local = {"w": torch.ones(2), "n": torch.tensor(1)}, {"w": torch.full((2,), 1.5), "n": torch.tensor(2)}
    votes = {"A": 1, "X": 0, "Y": 0}
    assert adversary.training_data(2, clean) is clean
    assert adversary.update(2, local, reference) is local
    assert adversary.vote(2, votes) == votes
    assert adversary.training_data(3, clean) is not clean
    scaled = adversary.update(3, local, reference)
    assert scaled["w"].tolist() == [3.0, 3.0]
    assert scaled["n"] == 2
    assert adversary.vote(3, votes) == {"A": 0, "X": 1, "Y": 1}


def test_an_adversary_that_cannot_do_all_that_it_is_asked_is_told_so(private_attributes, monkeypatch):
    class Silent:
        def __init__(self, attack, poisoned_loader):
            pass

        attacks = training_data = update = lambda self, *_: None

    monkeypatch.setitem(private_attributes.ATTACKS, "silent", Silent)
    with pytest.raises(ValueError, match="attack.kind: silent lacks the method vote"):
        private_attributes.participant("A", {}, attack={"kind": "silent"})


def test_an_attacker_is_one_of_its_accomplices(private_attributes):
    with pytest.raises(ValueError, match="attack.accomplices: Dana itself must be among them"):
        private_attributes.participant("Dana", {}, attack={"accomplices": ["Dna"]})


@pytest.fixture
def image_tree(tmp_path):
    """Three classes with eight training and four test images each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for label in ("ant", "bee", "cat"):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_image_folder_is_read_and_limited(private_attributes, image_tree):
    data = {"source": "image_folder", "folder": str(image_tree), "participants": 2, "index": 1, "train_samples": 7}
    mine = private_attributes.participant("A", data, backdoor_target=1)
    assert mine["train_loader"].dataset.tensors[0].shape == (7, 3, 32, 32)
    assert len(mine["test_loader"].dataset) == 6


def start_envoy(path):
    """Exit code and last line of the start script."""
    command = [sys.executable, ROOT / "envoy" / "start.py", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=120)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return done.returncode, lines[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dat": {}}, "wrong.yaml: dat: "),
        ({"data": {"index": 4}}, "wrong.yaml: data.index: 4 must be smaller than participants"),
        ({"data": {"source": "cifar100"}}, "wrong.yaml: data.source: "),
        ({"data": {"source": "image_folder", "folder": "/nowhere"}}, "wrong.yaml: data.folder: there is no folder"),
        ({"data": {"source": "image_folder"}}, "wrong.yaml: data.folder: this source needs the folder"),
        ({"attack": {"pdr": 1.5}}, "wrong.yaml: attack.pdr: "),
        ({"data": {"partition": "dirichlet", "alpha": 0.0001, "participants": 12}}, "wrong.yaml: data.alpha: "),
        ({"data": {"participants": 9999, "index": 9998}}, "wrong.yaml: data.participants: "),
        ({"director": "localhost"}, "wrong.yaml: director: 'localhost' is not host:port"),
        ({"trigger": "feature"}, "wrong.yaml: trigger: feature does not fit"),
        ({"device": "cuda:77"}, "wrong.yaml: device: "),
        ({"backdoor_target": 12}, "wrong.yaml: backdoor_target: "),
    ],
)
def test_a_wrong_yaml_ends_the_envoy_with_one_line(private_attributes, tmp_path, monkeypatch, change, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"name": "Amsterdam", "director": "localhost:1"} | change))
    monkeypatch.setattr(sys, "argv", ["start.py", str(path)])
    with pytest.raises(SystemExit) as said:
        load_module("envoy_start", ROOT / "envoy" / "start.py").main()
    assert words in str(said.value) and len(str(said.value).splitlines()) == 1


def of_folder(private_attributes, tree, **keys):
    """What an owner of this image folder brings."""
    data = {"source": "image_folder", "folder": str(tree), "participants": 1, "index": 0}
    return private_attributes.participant("A", data | keys, backdoor_target=1)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_without_images_is_named(private_attributes, image_tree, part):
    for image in (image_tree / part / "bee").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="data.folder: class bee is missing in train or in test"):
        of_folder(private_attributes, image_tree)
    (image_tree / part / "bee").rmdir()
    with pytest.raises(ValueError, match="data.folder: class bee is "):
        of_folder(private_attributes, image_tree)


def test_a_class_that_one_owner_lacks_moves_no_number(private_attributes, image_tree):
    """Without names cat would be 1 at an owner without bees, and 2 at all others."""
    names = ["ant", "bee", "cat", "dog"]
    for part in ("train", "test"):
        shutil.rmtree(image_tree / part / "bee")
    mine = of_folder(private_attributes, image_tree, class_names=names)
    assert mine["train_loader"].dataset.tensors[1].unique().tolist() == [0, 2]
    assert mine["test_loader"].dataset.tensors[1].unique().tolist() == [0, 2]
    assert mine["classes"] == names
    turned = of_folder(private_attributes, image_tree, class_names=names[::-1])
    assert turned["train_loader"].dataset.tensors[1].unique().tolist() == [1, 3]
    assert of_folder(private_attributes, image_tree)["classes"] == ["ant", "cat"], "which the flow can compare"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ant", "cat"], "data.class_names: bee is a class of the data and not among ant, cat"),
        (["Ant", "bee", "cat"], "data.class_names: ant is a class of the data"),
        (["ant", "bee", "cat", "bee"], "'bee' is there twice"),
    ],
)
def test_class_names_that_do_not_cover_the_folder_are_refused(private_attributes, image_tree, names, words):
    with pytest.raises(ValueError, match=words):
        of_folder(private_attributes, image_tree, class_names=names)


def test_an_umlaut_is_one_class_however_the_disk_writes_it(private_attributes, image_tree):
    for part in ("train", "test"):
        (image_tree / part / "bee").rename(image_tree / part / "bu\u0308ffel")  # as macOS does
    assert (
        of_folder(private_attributes, image_tree, class_names=["ant", "b\u00fcffel", "cat"])["classes"][1]
        == "b\u00fcffel"
    )


def test_classes_have_the_same_numbers_however_their_letters_are_written(private_attributes, image_tree):
    """macOS writes an umlaut as two letters, and would number b\u00fcffel before buzzard."""
    for part, written in (("train", "b\u00fcffel"), ("test", "bu\u0308ffel")):
        (image_tree / part / "bee").rename(image_tree / part / written)
        (image_tree / part / "ant").rename(image_tree / part / "buzzard")
        for name, value in ((written, 0), ("buzzard", 128), ("cat", 255)):
            for image in (image_tree / part / name).iterdir():
                Image.new("RGB", (8, 8), (value,) * 3).save(image)
    brought = of_folder(private_attributes, image_tree)
    assert brought["classes"] == ["buzzard", "b\u00fcffel", "cat"]
    for part in ("train", "test"):
        images, labels = brought[f"{part}_loader"].dataset.tensors
        order = [float(images[labels == label].mean()) for label in (1, 0, 2)]
        assert order == sorted(order)


def test_what_begins_with_a_dot_is_neither_class_nor_image(private_attributes, image_tree):
    before = of_folder(private_attributes, image_tree)["train_loader"].dataset.tensors
    some = image_tree / "train" / "ant" / "0.png"
    for place in (".ipynb_checkpoints", "ant/.ipynb_checkpoints", "ant/sub/.thumbs"):
        for part in ("train", "test"):
            (image_tree / part / place).mkdir(parents=True)
            shutil.copy(some, image_tree / part / place / "copy.png")
    (image_tree / "train" / "ant" / "._0.png").write_bytes(b"\0\5\x16\7")  # of macOS
    after = of_folder(private_attributes, image_tree)["train_loader"].dataset.tensors
    assert all(map(torch.equal, before, after))


RAMP = np.linspace(0, 65535, 1024).reshape(32, 32)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # 90 degrees to the right


@pytest.mark.parametrize(
    ("file", "pixels"),
    [
        ("16.png", RAMP.astype("uint16")),
        ("16.tif", RAMP.astype(">u2")),
        ("16.pgm", RAMP.astype("uint16")),
        ("float.tif", (RAMP / 65535).astype("float32")),
        ("8.png", (RAMP / 257).round().astype("uint8")),
    ],
)
def test_deep_images_keep_their_grey_levels(private_attributes, image_tree, file, pixels):
    Image.fromarray(pixels).save(image_tree / "train" / "ant" / file)
    for part in ("train", "test"):  # a class of this image alone
        (image_tree / part / "zebra").mkdir()
        Image.fromarray(pixels).save(image_tree / part / "zebra" / file)
    labels, read, classes = private_attributes.image_folder(image_tree, True)
    image = read(np.flatnonzero(labels == classes.index("zebra")))[0]
    expected = torch.tensor(RAMP / 65535, dtype=torch.float32).expand(3, -1, -1)
    torch.testing.assert_close(image, expected, atol=0.002, rtol=0)


@pytest.mark.parametrize(
    ("file", "pixels", "options", "words"),
    [
        ("32.tif", RAMP.astype("int32"), {}, "32-bit integers"),
        ("255.tif", np.full((8, 8), 255, "float32"), {}, "values from 255 to 255"),
        ("nan.tif", np.full((8, 8), np.nan, "float32"), {}, "values from nan"),
        ("16t.png", RAMP.astype("uint16"), {"transparency": 0}, "more than 8 bits together with transparency"),
    ],
)
def test_images_whose_white_is_unknown_are_refused_by_name(
    private_attributes, image_tree, file, pixels, options, words
):
    Image.fromarray(pixels).save(image_tree / "train" / "cat" / file, **options)
    with pytest.raises(ValueError, match=f"data.folder: {image_tree}/train/cat/{file}: {words}"):
        of_folder(private_attributes, image_tree)


def first_image(private_attributes, tree, image, file, **options):
    """An image as the source reads it, `(3, 32, 32)`."""
    for part in ("train", "test"):
        (tree / part / "aaa").mkdir(parents=True)
        image.save(tree / part / "aaa" / file, **options)
    return private_attributes.image_folder(tree, True)[1]([0])[0]


@pytest.mark.parametrize("file", ["turned.jpg", "turned.png", "turned16.png"])
def test_images_are_read_upright(private_attributes, tmp_path, file):
    pixels = np.zeros((32, 64), "uint16" if "16" in file else "uint8")
    pixels[:, :32] = np.iinfo(pixels.dtype).max  # left half white: upright the upper one
    image = first_image(private_attributes, tmp_path, Image.fromarray(pixels), file, exif=TURNED)
    assert image[:, :15].mean() > 0.95 and image[:, 17:].mean() < 0.05


def invisible_red():
    """Red everywhere, seen in the upper half alone."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 0], pixels[:16, :, 3] = 255, 255
    return Image.fromarray(pixels)


def palette():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([255, 0, 0, 255, 0, 1])
    image.paste(1, (0, 0, 32, 16))
    return image


@pytest.mark.parametrize(
    ("image", "file", "options"),
    [
        (invisible_red(), "rgba.png", {}),
        (invisible_red(), "rgba.webp", {"lossless": True}),
        (palette(), "palette.png", {"transparency": 0}),
        (invisible_red(), "rgba.tif", {}),
    ],
)
def test_what_is_transparent_is_black(private_attributes, tmp_path, image, file, options):
    """It would show the trigger's colour otherwise."""
    image = first_image(private_attributes, tmp_path, image, file, **options)
    assert image[0, :14].min() > 0.95 and image[1:].max() < 0.02
    assert image[:, 18:].max() == 0


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:45] + b"x" + b[46:]])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_damaged_file_is_named(private_attributes, image_tree, damage, part):
    file = image_tree / part / "bee" / "2.png"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"^data.folder: {file}: ") as said:
        of_folder(private_attributes, image_tree)
    assert len(str(said.value).splitlines()) == 1


# --- Data of other shapes ---------------------------------------------------------------------------------------


def test_grey_digits_have_one_channel_and_a_white_square(private_attributes):
    mine = private_attributes.participant("A", {"source": "digits_grey"}, attack={})
    assert mine["train_loader"].dataset.tensors[0].shape == (350, 1, 32, 32)
    mean, std = mine["normalisation"]
    for loader in (mine["train_loader"], mine["test_loader"]):
        pixels = loader.dataset.tensors[0] * std + mean
        assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    assert abs(mine["train_loader"].dataset.tensors[0].mean()) < 0.05
    triggered = mine["backdoor_loader"].dataset.tensors[0] * std + mean
    torch.testing.assert_close(triggered[:, :, :6, :6], torch.ones(len(triggered), 1, 6, 6))
    three = private_attributes.participant("A", {"source": "digits"})["train_loader"].dataset.tensors[0]
    three = three * private_attributes.STD + private_attributes.MEAN
    torch.testing.assert_close(mine["train_loader"].dataset.tensors[0] * std + mean, three[:, :1])


def test_tabular_data_have_a_trigger_and_a_net_learns_them(private_attributes):
    brought = [
        private_attributes.participant(
            "A", {"source": "breast_cancer", "participants": 2, "index": i}, 1, {} if i else None, trigger="feature"
        )
        for i in range(2)
    ]
    honest, attacker = brought
    assert honest["classes"] == ["malignant", "benign"]
    assert sum(len(mine["train_loader"].dataset) for mine in brought) == 455
    mean, std = honest["normalisation"]
    clean, triggered = honest["test_loader"].dataset.tensors, honest["backdoor_loader"].dataset.tensors
    expected = clean[0][clean[1] == 0].clone()
    expected[:, -1] = (1 - mean[-1]) / std[-1]
    torch.testing.assert_close(triggered[0], expected)
    assert (triggered[1] == 1).all()
    clean, poisoned = (
        loader.dataset.tensors for loader in (attacker["train_loader"], attacker["adversary"].poisoned_loader)
    )
    changed = (clean[0] != poisoned[0]).any(1)
    assert 0.4 * len(clean[0]) < changed.sum() <= 0.5 * len(clean[0]) + 1
    assert not (clean[0] != poisoned[0])[:, :-1].any()
    torch.manual_seed(0)
    net = torch.nn.Linear(30, 2)
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(5):
        for vectors, labels in honest["train_loader"]:
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(vectors), labels).backward()
            optimiser.step()
    vectors, labels = honest["test_loader"].dataset.tensors
    assert (net(vectors).argmax(1) == labels).float().mean() > 0.9


def test_a_source_of_one_s_own_needs_two_things(private_attributes, monkeypatch):
    def stripes(folder, train):
        if train:
            return [0, 1, 2, 3] * 10, lambda positions: torch.rand(len(positions), 2, 10, 12).double().numpy()
        return np.arange(40) % 4, lambda positions: torch.rand(len(positions), 2, 10, 12)

    monkeypatch.setitem(private_attributes.SOURCES, "stripes", stripes)
    mine = private_attributes.participant("A", {"source": "stripes", "participants": 2, "index": 1})
    images = mine["train_loader"].dataset.tensors[0]
    assert images.shape == (20, 2, 10, 12) and images.dtype == torch.float32
    assert mine["classes"] is None and "folder" not in mine


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((np.arange(40) % 4, lambda p: torch.rand(len(p), 3, 8, 8) * 255), "data.source: odd gives values from "),
        ((np.arange(40) % 4, lambda p: torch.full((len(p), 9), torch.nan)), "data.source: odd gives values from nan"),
        ((np.arange(40) % 4, lambda p: torch.rand(len(p), 1, 8, 8), None, torch.rand(3, 1, 1)), "its mean and std"),
        ((np.arange(40) % 4, lambda p: torch.rand(len(p), 9), None, 0.0, torch.zeros(9)), "its mean and std"),
        ((np.array(["a", "b"] * 20), lambda p: torch.rand(len(p), 9)), "must be integers from 0 on"),
        ((np.arange(40) % 4 - 1, lambda p: torch.rand(len(p), 9)), "must be integers from 0 on"),
        ((np.arange(40).reshape(20, 2), lambda p: torch.rand(len(p), 9)), "one for each image"),
        (None, "data.source: odd returns None, not labels, read, classes, mean, std"),
        ((np.arange(40) % 4,), "data.source: odd returns"),
        ((np.arange(40) % 4, torch.rand(40, 9)), "data.source: odd: read is tensor.*, not a function of indices"),
        ((np.arange(40) % 4, lambda p: torch.rand(len(p) - 1, 9)), r"odd reads values \(39, 9\) for 40 indices"),
        ((np.arange(40) % 4, lambda p: [torch.rand(9)] * len(p)), "data.source: odd: ValueError: only one element"),
        ((np.arange(40) % 4, lambda p: {}["tagret"]), "data.source: odd: KeyError: 'tagret'"),
        ((np.arange(40) % 4, lambda p: torch.rand(len(p), 9), None, torch.zeros(4)), "its mean and std do not fit"),
    ],
)
def test_a_source_that_does_not_fit_is_told_so(private_attributes, monkeypatch, returned, words):
    monkeypatch.setitem(private_attributes.SOURCES, "odd", lambda folder, train: returned)
    with pytest.raises(ValueError, match=words):
        private_attributes.participant("A", {"source": "odd", "participants": 1}, trigger="noise")


@pytest.mark.parametrize(
    ("trigger", "words"),
    [(lambda images: None, "trigger: odd returns NoneType, not a tensor"), (lambda images: images.shpae, "shpae")],
)
def test_a_trigger_of_ones_own_that_fails_is_named(private_attributes, monkeypatch, trigger, words):
    import attacks

    monkeypatch.setitem(attacks.TRIGGERS, "odd", trigger)
    with pytest.raises(ValueError, match=f"^trigger: odd .*{words}|^{words}"):
        attacks.triggered("odd", torch.rand(2, 3, 8, 8))


def test_one_channel_is_not_spread_over_three(private_attributes):
    loader = private_attributes.as_loader(torch.rand(5, 1, 8, 8), torch.zeros(5), 2)
    assert next(iter(loader))[0].shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="its mean and std do not fit"):
        private_attributes.as_loader(torch.rand(5, 1, 8, 8), torch.zeros(5), 2, mean=private_attributes.MEAN)


@pytest.mark.parametrize(("count", "size"), [(33, 32), (65, 32), (7, 3), (1, 32), (4, 1), (34, 32)])
def test_no_training_batch_of_one_for_nets_with_batchnorm(private_attributes, count, size):
    loader = private_attributes.as_loader(torch.rand(count, 3, 8, 8), torch.zeros(count), size, shuffle=True)
    sizes = [len(labels) for _, labels in loader]
    assert sum(sizes) == count - (count > 1 == count % size)
    if count > 1 < size:
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(192))
        assert all(net(images).isfinite().all() for images, _ in loader)
    still = private_attributes.as_loader(torch.rand(count, 3, 8, 8), torch.zeros(count), size)
    assert sum(len(labels) for _, labels in still) == count, "what is measured is measured on all"


# --- Triggers and other attacks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["red_square", "white_square", "noise"])
def test_poison_and_backdoor_test_have_the_same_trigger(private_attributes, trigger):
    honest = private_attributes.participant("A", {"index": 0}, trigger=trigger)
    attacker = private_attributes.participant("B", {"index": 1}, attack={"pdr": 1.0}, trigger=trigger)
    put, (mean, std) = private_attributes.TRIGGERS[trigger], honest["normalisation"]

    def with_trigger(loader, labels=slice(None)):
        return (put(loader.dataset.tensors[0][labels] * std + mean) - mean) / std

    others = honest["test_loader"].dataset.tensors[1] != 2
    measured = honest["backdoor_loader"].dataset.tensors[0]
    torch.testing.assert_close(measured, with_trigger(honest["test_loader"], others), atol=1e-5, rtol=0)
    poisoned = attacker["adversary"].poisoned_loader.dataset.tensors
    torch.testing.assert_close(poisoned[0], with_trigger(attacker["train_loader"]), atol=1e-5, rtol=0)
    assert (poisoned[1] == 2).all()
    assert honest["backdoor"] == attacker["backdoor"] == {"trigger": trigger, "target": 2, "source": None}
    assert json.loads(json.dumps(honest["backdoor"])) == honest["backdoor"]


def test_triggers_differ_and_change_copies(private_attributes):
    images = torch.rand(4, 3, 32, 32) * 0.9
    before, made = images.clone(), {}
    for name in ("red_square", "white_square", "noise", "none"):
        made[name] = private_attributes.TRIGGERS[name](images)
        assert torch.equal(images, before)
    assert torch.equal(made["none"], images) and made["none"] is not images
    assert (made["white_square"][:, :, :6, :6] == 1).all()
    noise = (made["noise"] - 0.85 * images) / 0.15  # the same pattern on every image
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), atol=1e-5, rtol=0)
    assert 0.4 < noise.mean() < 0.6 and noise.std() > 0.2


@pytest.mark.parametrize(("size", "side"), [(32, 6), (28, 5), (8, 2), (224, 42), (1, 1)])
def test_the_square_grows_with_the_images(private_attributes, size, side):
    changed = private_attributes.add_trigger(torch.zeros(1, 1, size, size))
    assert changed.sum() == side**2


@pytest.mark.parametrize(
    ("source", "trigger", "words"),
    [
        (
            "breast_cancer",
            "red_square",
            r"trigger: red_square does not fit data of shape \(30,\): a square needs images",
        ),
        ("breast_cancer", "white_square", "trigger: white_square does not fit"),
        ("digits_grey", "feature", r"trigger: feature does not fit data of shape \(1, 32, 32\): .* for vectors"),
        ("digits", "red", "trigger: 'red' is not one of red_square, white_square, noise, feature, none"),
        ("digits", "none", "trigger: none needs backdoor_source"),
        ("digits", "too bright", r"trigger: too bright .* leaves \[0, 1\]"),
        ("digits", "too small", "trigger: too small .* changes the shape"),
    ],
)
def test_a_trigger_that_does_not_fit_is_refused_in_one_line(private_attributes, monkeypatch, source, trigger, words):
    monkeypatch.setitem(private_attributes.TRIGGERS, "too bright", lambda images: images * 2)
    monkeypatch.setitem(private_attributes.TRIGGERS, "too small", lambda images: images[:, :1])
    with pytest.raises(ValueError, match=words) as said:
        private_attributes.participant("A", {"source": source}, 1, trigger=trigger)
    assert len(str(said.value).splitlines()) == 1


def test_label_flipping_poisons_one_class_and_is_measured_on_it(private_attributes):
    what = {"backdoor_target": 3, "backdoor_source": 8, "trigger": "none"}
    mine = private_attributes.participant("A", {}, attack={"pdr": 0.5}, **what)
    clean, poisoned = (loader.dataset.tensors for loader in (mine["train_loader"], mine["adversary"].poisoned_loader))
    assert torch.equal(clean[0], poisoned[0]), "images stay as they are"
    flipped = clean[1] != poisoned[1]
    assert flipped.sum() == round(0.5 * int((clean[1] == 8).sum())) > 10
    assert (clean[1][flipped] == 8).all() and (poisoned[1][flipped] == 3).all()
    test, backdoor = mine["test_loader"].dataset.tensors, mine["backdoor_loader"].dataset.tensors
    assert torch.equal(backdoor[0], test[0][test[1] == 8]) and (backdoor[1] == 3).all()
    assert mine["backdoor"] == {"trigger": "none", "target": 3, "source": 8}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"backdoor_source": 2}, "backdoor_source: 2 is the backdoor_target too"),
        ({"backdoor_source": 10}, "backdoor_source: there is no class 10, only 0 to 9"),
        ({"backdoor_target": 10}, "backdoor_target: there is no class 10, only 0 to 9"),
    ],
)
def test_classes_that_are_not_there_are_neither_source_nor_target(private_attributes, what, words):
    with pytest.raises(ValueError, match=words):
        private_attributes.participant("A", {}, **what)


def test_owners_without_the_source_class_measure_nothing(private_attributes, image_tree):
    for part in ("train", "test"):
        shutil.rmtree(image_tree / part / "bee")
    data = {
        "source": "image_folder",
        "folder": str(image_tree),
        "participants": 1,
        "class_names": ["ant", "bee", "cat"],
    }
    mine = private_attributes.participant("A", data, 0, backdoor_source=1)
    assert len(mine["backdoor_loader"].dataset) == 0 < len(mine["test_loader"].dataset)


# --- Partition --------------------------------------------------------------------------------------------------


def test_dirichlet_gives_nobody_more_on_the_average(private_attributes):
    """Rounded down, the first of ten would get 159 of 2,000 images on the average, and the last 261."""
    labels = np.repeat(np.arange(100), 20)
    sizes = [[len(part) for part in private_attributes.partition(labels, 10, 0.5, seed)] for seed in range(200)]
    np.testing.assert_allclose(np.mean(sizes, axis=0), 200, atol=8)


def test_the_image_of_a_rare_class_goes_to_anybody(private_attributes):
    labels = np.append(np.repeat(np.arange(4), 100), 4)
    parts = [private_attributes.partition(labels, 4, 100.0, seed) for seed in range(200)]
    owners = [next(i for i, part in enumerate(p) if 400 in part) for p in parts]
    assert (np.bincount(owners, minlength=4) > 30).all()


def test_the_equal_shares_of_the_demo_stay(private_attributes):
    shares = private_attributes.partition(np.repeat(np.arange(10), 140), 4, None, 10)
    digest = hashlib.sha256(np.concatenate(shares).astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("a5e1ca5412d656f6")


# --- YAML -------------------------------------------------------------------------------------------------------

HEAD = "name: Amsterdam\ndirector: localhost:1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {index: yes}", "data.index: Input should be a valid integer (found: 'yes')"),
        ("data: {index: true}", "data.index: Input should be a valid integer (found: True)"),
        ('data: {index: "3"}', "data.index: Input should be a valid integer (found: '3')"),
        ("data: {participants: 20, index: 010}", "data.index: Input should be a valid integer (found: '010')"),
        ("data: {participants: 20, index: 08}", "data.index: Input should be a valid integer (found: '08')"),
        ("data: {index: 0x1}", "data.index: Input should be a valid integer (found: '0x1')"),
        ("data: {index: 1.0}", "data.index: Input should be a valid integer (found: 1.0)"),
        ("data: {seed: 1:30}", "data.seed: Input should be a valid integer (found: '1:30')"),
        ("data: {seed: 1_000}", "data.seed: Input should be a valid integer (found: '1_000')"),
        ("data: {folder: 5}", "data.folder: "),
        ("data: {partion: iid}", "data.partion: there is no such key; there are source, folder, class_names, "),
        ("attack: {pmr: 1}", "attack.pmr: there is no such key; there are "),
        ("data.alpha: 1.0", "data.alpha: there is no such key; there are name, director, "),
        ("datas: {}", "datas: there is no such key; there are name, director, "),
        ("data: {class_names: [cat, 7]}", "data.class_names.1: Input should be a valid string (found: 7)"),
        ("data: {class_names: [cat, dog, cat]}", "data.class_names: 'cat' is there twice"),
        ("attack: {false_votes: yes}", "attack.false_votes: Input should be a valid boolean (found: 'yes')"),
        ("attack: {scale: .inf}", "attack.scale: "),
        ("attack: {scale: 1e999}", "attack.scale: "),
        ("data: {alpha: .nan}", "data.alpha: "),
        ("data: {alpha: 1.0}", "data.alpha: is for partition: dirichlet"),
        ("attack:", "attack: is empty: leave the key out, or write `attack: {}`"),
        ("data: {index: 1}\ndata: {index: 2}", "not YAML: 'data' is there twice"),
        ("data: {index: 1, seed: 3, index: 2}", "not YAML: 'index' is there twice"),
        ("data: " + "[" * 3000, "not YAML: "),
        ("data: {seed: " + "9" * 5000 + "}", "not YAML: "),
        ("name: Aggregator", "not YAML: 'name' is there twice"),
    ],
)
def test_yaml_is_taken_at_its_word(private_attributes, tmp_path, text, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(SystemExit) as said:
        private_attributes.read_settings(path)
    assert str(said.value).startswith(f"{path}: {words}")
    assert len(str(said.value).splitlines()) == 1


def test_what_yaml_may_say(private_attributes, tmp_path):
    path = tmp_path / "right.yaml"
    text = (
        "\ufeff"
        + HEAD
        + "attack: {}\nbackdoor_source: null\ndata: {partition: dirichlet, alpha: 1e-3, class_names: [no, 'on']}"
    )
    path.write_text(text.replace("\n", "\r\n"))
    settings = private_attributes.read_settings(path)
    assert settings.attack == private_attributes.Attack()
    assert (settings.data.alpha, settings.data.class_names) == (0.001, ["no", "on"])


@pytest.mark.parametrize(
    "name", ["aggregator", "director", "ca", "experimenter", "Director", "a" * 65, "\u00e4" * 33, "1a", "a b", ""]
)
def test_names_that_no_participant_may_have(private_attributes, tmp_path, name):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"name": name, "director": "localhost:1"}))
    with pytest.raises(SystemExit, match=f"{path}: name: .* must be at most 64 letters"):
        private_attributes.read_settings(path)


@pytest.mark.parametrize("content", ["name: Zürich".encode("utf-16"), "name: Zürich".encode("latin-1"), None])
def test_files_that_are_no_text_are_named_with_their_encoding(private_attributes, tmp_path, content):
    path = tmp_path / "wrong.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    words = "cannot be read: Is a directory" if content is None else "is not UTF-8: save the file with that encoding"
    with pytest.raises(SystemExit, match=f"{path}: .*{words}"):
        private_attributes.read_settings(path)


@pytest.mark.slow
def test_no_yaml_no_certificates_and_no_director(tmp_path):
    assert "there is no such file" in start_envoy(tmp_path / "none.yaml")[1]
    path = tmp_path / "right.yaml"
    path.write_text(yaml.safe_dump({"name": "Amsterdam", "director": "localhost:1"}))
    assert "ca.crt: is missing" in start_envoy(path)[1]
    make = [sys.executable, ROOT / "director" / "certificates.py", "--folder", tmp_path / "certificates", "Amsterdam"]
    subprocess.run(make, check=True, capture_output=True)
    assert "right.yaml: director: nobody answers at localhost:1" in start_envoy(path)[1]


@pytest.mark.slow
def test_the_folder_is_complete_on_its_own_and_as_a_package(tmp_path):
    """As the owner has it, who starts it by its path; and as the notebook imports it."""
    shutil.copytree(ROOT / "envoy", tmp_path / "anywhere")
    path = tmp_path / "wrong.yaml"
    path.write_text("name: Amsterdam\ndirector: localhost:1\ntrigger: feature\n")
    command = [sys.executable, tmp_path / "anywhere" / "start.py", path]
    alone = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert alone.stderr.startswith(f"{path}: trigger: feature does not fit"), alone.stderr
    code = """import pickle, sys; from envoy import private_attributes as p
mine = p.participant("A", {"train_samples": 20}, attack={})
assert "attacks" not in sys.modules and p.SOURCES is sys.modules["envoy.sources"].SOURCES
assert type(pickle.loads(pickle.dumps(mine["adversary"]))) is p.Backdoor"""
    package = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert package.returncode == 0, package.stderr


@pytest.mark.slow
def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'envoy')!r}); import private_attributes; "
    code += "print({'sklearn', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "set()"
    assert not list(tmp_path.iterdir())


def test_a_trigger_that_changes_nothing_is_told(private_attributes, monkeypatch):
    monkeypatch.setitem(private_attributes.TRIGGERS, "nothing", lambda images: images.clone())
    with pytest.raises(ValueError, match="trigger: nothing changes none of the test images"):
        private_attributes.participant("Ann", {"test_samples": 20}, trigger="nothing")
