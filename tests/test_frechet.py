import numpy as np
import pytest

from l2c_export.errors import L2CError
from l2c_export.evidence.frechet import Gaussian, frechet_distance

ROTATION = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]


def gaussian(mean, deviations, rotation=None):
    basis = np.eye(len(mean)) if rotation is None else rotation
    return Gaussian(basis @ np.array(mean, float), basis * np.square(deviations) @ basis.T)


def test_gaussians_with_common_axes_differ_by_means_and_deviations():
    means, deviations = np.random.default_rng(1).random((2, 2, 6))
    a, b = (gaussian(m, d, ROTATION) for m, d in zip(means, deviations, strict=True))
    closed_form = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(closed_form, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(closed_form, rel=1e-12)


def test_gaussians_without_common_axes_agree_with_the_closed_form_of_two_dimensions():
    # tr((AB)^(1/2)) of 2 x 2 matrices is sqrt(tr(AB) + 2 sqrt(det(AB)))
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * overlap
    zero = np.zeros(2)
    assert frechet_distance(Gaussian(zero, a), Gaussian(zero, b)) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances_are_compared_too():
    line, point = gaussian([0, 0, 0, 0, 0, 1], [0, 2, 0, 0, 0, 0], ROTATION), gaussian([0] * 6, [0] * 6)
    assert frechet_distance(line, point) == pytest.approx(5)
    assert frechet_distance(line, line) == pytest.approx(0, abs=1e-6)


def test_a_gaussian_is_fitted_in_float64():
    features = (1000 + np.random.default_rng(2).random((500, 3))).astype(np.float32)
    fitted = Gaussian.of(features)
    assert fitted.covariance.dtype == np.float64
    np.testing.assert_allclose(fitted.covariance, np.cov(features.astype(np.float64).T), rtol=1e-12)


@pytest.mark.parametrize("features", [np.ones((1, 3)), np.ones(3), np.full((4, 3), np.nan)])
def test_features_that_make_no_gaussian_are_refused(features):
    with pytest.raises(L2CError, match="two or more rows of finite features"):
        Gaussian.of(features)


def test_other_features_are_refused():
    with pytest.raises(L2CError, match="2 features cannot be compared with 3"):
        frechet_distance(gaussian([0, 0], [1, 1]), gaussian([0] * 3, [1] * 3))
