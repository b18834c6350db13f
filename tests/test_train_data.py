import numpy as np
import pytest
from PIL import Image

from l2c_export.core.models import DiTConfig
from l2c_export.errors import L2CError
from l2c_export.train.data import read_dataset

CONFIG = DiTConfig(1, 16, 2, 2, 4, in_channels=1, num_classes=3, learn_sigma=False, guidance_channels=1)
SHAPE = (5, 1, 4, 4)


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def test_latents_are_scaled_and_images_are_not(tmp_path):
    values, labels = np.full(SHAPE, 0.5, np.float32), np.array([0, 1, 2, 0, 1])
    latents = read_dataset(npz(tmp_path, latents=values, labels=labels), CONFIG, 0.5)
    assert latents.read([0])[0].unique().item() == 0.25
    images = read_dataset(npz(tmp_path, images=values, labels=labels), CONFIG, 0.5)
    x, y = images.read([4, 2])
    assert x.unique().item() == 0.5
    assert y.tolist() == [1, 2]


def test_bytes_become_minus_one_to_one(tmp_path):
    values = np.zeros(SHAPE, np.uint8)
    values[1] = 255
    data = read_dataset(npz(tmp_path, images=values, labels=np.zeros(5, np.uint8)), CONFIG)
    assert [data.read([row])[0].unique().item() for row in (0, 1)] == [-1, 1]


def test_a_folder_is_read_by_class(tmp_path):
    for name in ("2", "0"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "0" / "a.npy", np.full(SHAPE[1:], 3.0))
    Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).save(tmp_path / "2" / "b.png")
    data = read_dataset(tmp_path, CONFIG, 2.0)
    x, y = data.read([0, 1])
    assert y.tolist() == [0, 2]
    assert [x[0].unique().item(), x[1].unique().item()] == [6, 1]


def test_class_names_count_in_order(tmp_path):
    for name in ("cat", "ant", "bee"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.zeros(SHAPE[1:], np.float32))
    data = read_dataset(tmp_path, CONFIG)
    assert [path.parent.name for path in data.files] == ["ant", "bee", "cat"]
    assert data.labels.tolist() == [0, 1, 2]


def test_the_digest_tells_data_apart(tmp_path):
    labels = np.zeros(5, np.int64)
    one = read_dataset(npz(tmp_path, latents=np.zeros(SHAPE, np.float32), labels=labels), CONFIG)
    two = read_dataset(npz(tmp_path, latents=np.ones(SHAPE, np.float32), labels=labels), CONFIG)
    assert one.digest != two.digest


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"latents": np.zeros(SHAPE)}, "must hold 'labels' and one of"),
        ({"labels": np.zeros(5, int)}, "must hold 'labels' and one of"),
        ({"latents": np.zeros((5, 1, 8, 8)), "labels": np.zeros(5, int)}, "'latents' is "),
        ({"latents": np.zeros(SHAPE), "labels": np.zeros(4, int)}, "'latents' is "),
        ({"latents": np.zeros(SHAPE, complex), "labels": np.zeros(5, int)}, "complex128"),
        ({"latents": np.zeros(SHAPE), "labels": np.zeros(5)}, "it must be .* integers"),
        (
            {"latents": np.zeros(SHAPE), "labels": np.full(5, 3)},
            r"labels are 3 … 3, the model has 0 … 2",
        ),
        ({"latents": np.zeros(SHAPE), "labels": np.full(5, -1)}, "labels are -1"),
        ({"latents": np.array([None]), "labels": np.zeros(1, int)}, "no .npz of plain arrays"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, arrays, message):
    with pytest.raises(L2CError, match=message):
        read_dataset(npz(tmp_path, **arrays), CONFIG)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [("latents", np.nan, "holds NaN or Inf"), ("images", 2.0, r"must be in -1 … 1, found 2")],
)
def test_values_that_cannot_be_are_refused_when_read(tmp_path, kind, value, message):
    path = npz(tmp_path, **{kind: np.full(SHAPE, value), "labels": np.zeros(5, int)})
    with pytest.raises(L2CError, match=message):
        read_dataset(path, CONFIG).read([0])


def test_a_place_without_data_is_refused(tmp_path):
    with pytest.raises(L2CError, match="has no class folders"):
        read_dataset(tmp_path, CONFIG)
    with pytest.raises(L2CError, match="no training data at"):
        read_dataset(tmp_path / "data.bin", CONFIG)
    with pytest.raises(L2CError, match="cannot read training data"):
        read_dataset(tmp_path / "data.npz", CONFIG)
    (tmp_path / "data.npz").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(L2CError, match=r"no \.npz of plain arrays"):
        read_dataset(tmp_path / "data.npz", CONFIG)


def test_a_folder_of_another_model_is_refused_at_once(tmp_path):
    (tmp_path / "0").mkdir()
    np.save(tmp_path / "0" / "x.npy", np.zeros((4, 32, 32)))
    with pytest.raises(L2CError, match=r"x.npy is \(4, 32, 32\), the model takes \(1, 4, 4\)"):
        read_dataset(tmp_path, CONFIG)
    (tmp_path / "0" / "x.npy").write_bytes(b"no array")
    with pytest.raises(L2CError, match="cannot read latent"):
        read_dataset(tmp_path, CONFIG)
    (tmp_path / "0" / "a.png").write_bytes(b"no image")
    with pytest.raises(L2CError, match="cannot read image"):
        read_dataset(tmp_path, CONFIG)
