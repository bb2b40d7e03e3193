"""What a participant brings: shards, trigger, poison, and one clear line for a wrong YAML file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
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


@pytest.mark.parametrize(("pdr", "expected"), [(0.0, 0), (0.1, 20), (0.5, 100), (1.0, 200), (0.004, 1)])
def test_poison_rate_is_exact(private_attributes, pdr, expected):
    images, labels = torch.rand(200, 3, 32, 32) * 0.9, torch.arange(200) % 10
    poisoned, wanted = private_attributes.poison(images, labels, target=2, pdr=pdr, seed=0)
    changed = (poisoned != images).flatten(1).any(1)
    assert changed.sum() == expected
    assert (wanted[changed] == 2).all()
    assert torch.equal(wanted[~changed], labels[~changed])


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
    command = [sys.executable, "-W", "ignore", ROOT / "envoy" / "start.py", path]
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
        ({"data": {"source": "image_folder"}}, "wrong.yaml: data.folder: "),
        ({"attack": {"pdr": 1.5}}, "wrong.yaml: attack.pdr: "),
        ({"data": {"partition": "dirichlet", "alpha": 0.0001, "participants": 12}}, "wrong.yaml: data.alpha: "),
        ({"data": {"participants": 9999, "index": 9998}}, "wrong.yaml: data.participants: "),
        ({"director": "localhost"}, "wrong.yaml: director: "),
        ({"device": "cuda:77"}, "wrong.yaml: device: "),
        ({"backdoor_target": 12}, "wrong.yaml: backdoor_target: "),
    ],
)
def test_a_wrong_yaml_ends_the_envoy_with_one_line(tmp_path, change, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"name": "Amsterdam", "director": "localhost:1"} | change))
    code, line = start_envoy(path)
    assert code == 1
    assert words in line


def test_a_class_without_images_ends_the_envoy_with_one_line(tmp_path, image_tree):
    for image in (image_tree / "train" / "bee").iterdir():
        image.unlink()
    path = tmp_path / "wrong.yaml"
    data = {"source": "image_folder", "folder": str(image_tree), "participants": 2, "index": 0}
    path.write_text(yaml.safe_dump({"name": "Amsterdam", "director": "localhost:1", "data": data}))
    code, line = start_envoy(path)
    assert code == 1
    assert "wrong.yaml: data.folder: " in line
    assert "bee" in line


def test_no_yaml_no_certificates_and_no_director(tmp_path):
    assert "there is no such file" in start_envoy(tmp_path / "none.yaml")[1]
    path = tmp_path / "right.yaml"
    path.write_text(yaml.safe_dump({"name": "Amsterdam", "director": "localhost:1"}))
    assert "ca.crt: is missing" in start_envoy(path)[1]
    make = [sys.executable, ROOT / "director" / "certificates.py", "--folder", tmp_path / "certificates", "Amsterdam"]
    subprocess.run(make, check=True, capture_output=True)
    assert "right.yaml: director: nobody answers at localhost:1" in start_envoy(path)[1]


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'envoy')!r}); import private_attributes; "
    code += "print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "False"
    assert not list(tmp_path.iterdir())
