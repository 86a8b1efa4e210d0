"""Facts about the metrics: closed forms, invariances and toy cases with known answers."""

import math
import sys

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from fewstep.errors import ConfigError, MissingExtraError, ShapeError
from fewstep.metrics.diversity import intra_prompt_diversity
from fewstep.metrics.frechet import frechet_distance, frechet_from_features, mean_and_cov
from fewstep.metrics.manifold import manifold_scores
from fewstep.metrics.parity import image_parity, worst_parity


def random_cov(size: int, seed: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


class TestFrechetDistance:
    def test_diagonal_gaussians_have_the_closed_form(self) -> None:
        mean1, mean2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, -1.0, 2.0])
        std1, std2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.0])
        found = frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2))
        assert found == pytest.approx(1 + 4 + 4 + 0.25, abs=1e-12)

    def test_is_zero_at_equality_even_for_large_covariances(self) -> None:
        cov, mean = 1e4 * random_cov(64, 0), np.full(64, 7.0)
        assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-8)

    def test_is_symmetric_and_unchanged_by_a_common_rotation(self) -> None:
        cov1, cov2 = random_cov(12, 1), random_cov(12, 2)
        mean1, mean2 = np.zeros(12), np.linspace(-1, 1, 12)
        turn = ortho_group.rvs(12, random_state=3)
        plain = frechet_distance(mean1, cov1, mean2, cov2)
        turned = frechet_distance(
            turn @ mean1, turn @ cov1 @ turn.T, turn @ mean2, turn @ cov2 @ turn.T
        )
        assert turned == pytest.approx(plain, rel=1e-12)
        assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(plain, rel=1e-12)

    def test_agrees_with_sqrtm_on_well_conditioned_input(self) -> None:
        cov1, cov2 = random_cov(32, 4), random_cov(32, 5)
        expected = np.trace(cov1 + cov2 - 2 * np.real(sqrtm(cov1 @ cov2)))
        found = frechet_distance(np.zeros(32), cov1, np.zeros(32), cov2)
        assert found == pytest.approx(expected, rel=1e-10)

    def test_rank_deficient_covariances_keep_their_closed_form(self) -> None:
        """Gaussians on orthogonal planes share nothing: the cross term is 0."""
        turn = ortho_group.rvs(40, random_state=6)
        cov1 = turn[:, :2] @ np.diag([4.0, 1.0]) @ turn[:, :2].T
        cov2 = turn[:, 2:4] @ np.diag([9.0, 2.0]) @ turn[:, 2:4].T
        found = frechet_distance(np.zeros(40), cov1, np.zeros(40), cov2)
        assert found == pytest.approx(16.0, abs=1e-10)
        assert frechet_distance(np.zeros(40), cov1, np.zeros(40), cov1) < 1e-10

    def test_zero_covariances_leave_the_shift(self) -> None:
        zero = np.zeros((3, 3))
        assert frechet_distance(np.zeros(3), zero, np.full(3, 2.0), zero) == 12.0

    def test_tiny_negative_eigenvalues_are_rounding(self) -> None:
        cov = np.diag([1.0, -1e-12])
        assert frechet_distance(np.zeros(2), cov, np.zeros(2), np.diag([1.0, 0.0])) < 1e-11

    def test_a_truly_negative_covariance_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="eigenvalue -0.5"):
            frechet_distance(np.zeros(2), np.diag([1.0, -0.5]), np.zeros(2), np.eye(2))

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ShapeError, match="wanted"):
            frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_refused(self, bad: float) -> None:
        with pytest.raises(ConfigError, match="NaN or infinity"):
            frechet_distance(np.array([0.0, bad]), np.eye(2), np.zeros(2), np.eye(2))


class TestFrechetFromFeatures:
    def test_sample_estimates_converge_to_the_closed_form_as_one_over_n(self) -> None:
        rng = np.random.default_rng(7)
        cov1, cov2 = random_cov(8, 8), random_cov(8, 9)
        mean2 = np.full(8, 0.3)
        truth = frechet_distance(np.zeros(8), cov1, mean2, cov2)
        errors = [
            np.mean(
                [
                    frechet_from_features(
                        rng.multivariate_normal(np.zeros(8), cov1, n),
                        rng.multivariate_normal(mean2, cov2, n),
                    )
                    - truth
                    for _ in range(100)
                ]
            )
            for n in (400, 1600)
        ]
        assert abs(errors[1]) < 0.03 * truth
        assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.5)

    def test_fewer_samples_than_features_still_give_zero_at_equality(self) -> None:
        features = np.random.default_rng(10).normal(size=(10, 64))
        assert frechet_from_features(features, features) < 1e-10

    def test_float32_features_are_computed_in_float64(self) -> None:
        features = np.random.default_rng(11).normal(1e4, 1.0, size=(500, 4)).astype(np.float32)
        mean, cov = mean_and_cov(features)
        assert mean.dtype == cov.dtype == np.float64
        assert frechet_from_features(features, features[::-1]) < 1e-8

    def test_one_row_is_refused(self) -> None:
        with pytest.raises(ShapeError, match="N >= 2"):
            frechet_from_features(np.zeros((1, 3)), np.zeros((5, 3)))


class TestManifoldScores:
    def test_equal_sets_score_one(self) -> None:
        points = np.random.default_rng(0).normal(size=(100, 3))
        found = manifold_scores(points, points.copy())
        assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)
        # each point lies in its own ball and on average in the balls of its k - 1 nearer ones
        assert found.density == pytest.approx(1.0)

    def test_distant_sets_score_zero(self) -> None:
        points = np.random.default_rng(1).normal(size=(50, 3))
        found = manifold_scores(points, points + 1000.0)
        assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)

    def test_dropping_a_mode_costs_recall_but_not_precision(self) -> None:
        rng = np.random.default_rng(2)
        left, right = rng.normal(-50, 1, (200, 2)), rng.normal(50, 1, (200, 2))
        found = manifold_scores(np.concatenate([left, right]), left + 1e-3)
        assert found.precision == 1.0
        assert found.recall == pytest.approx(0.5, abs=0.01)
        assert found.coverage == pytest.approx(0.5, abs=0.01)

    def test_inventing_a_mode_costs_precision_but_not_recall(self) -> None:
        rng = np.random.default_rng(3)
        left, right = rng.normal(-50, 1, (200, 2)), rng.normal(50, 1, (200, 2))
        found = manifold_scores(left + 1e-3, np.concatenate([left, right]))
        assert found.precision == pytest.approx(0.5, abs=0.01)
        assert found.recall == 1.0

    def test_five_points_on_a_line_by_hand(self) -> None:
        """With k = 1 every ball has radius 1 in both sets."""
        real = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
        generated = np.array([[3.5], [4.5], [10.5], [11.5], [12.5]])
        found = manifold_scores(real, generated, nearest=1)
        assert found.precision == pytest.approx(2 / 5)  # 3.5 and 4.5
        assert found.recall == pytest.approx(2 / 5)  # 3 and 4
        assert found.density == pytest.approx(3 / 5)  # 3.5 in two balls, 4.5 in one
        assert found.coverage == pytest.approx(2 / 5)  # 3 and 4

    def test_prints_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        points = np.random.default_rng(4).normal(size=(20, 2))
        manifold_scores(points, points)
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("real", "generated"),
        [((20, 3), (20, 4)), ((20,), (20, 3)), ((6, 3), (20, 3)), ((20, 3), (6, 3))],
    )
    def test_bad_shapes_are_refused(
        self, real: tuple[int, ...], generated: tuple[int, ...]
    ) -> None:
        with pytest.raises(ShapeError):
            manifold_scores(np.zeros(real), np.zeros(generated))

    def test_the_smallest_allowed_sets_work(self) -> None:
        points = np.random.default_rng(5).normal(size=(7, 2))
        assert manifold_scores(points, points).precision == 1.0

    def test_nan_features_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="NaN"):
            manifold_scores(np.zeros((20, 2)), np.full((20, 2), math.nan))

    def test_a_missing_library_is_named_with_its_extra(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "prdc", None)
        with pytest.raises(MissingExtraError, match=r"fewstep\[train\]"):
            manifold_scores(np.zeros((20, 2)), np.zeros((20, 2)))


class TestDiversity:
    def test_a_collapsed_set_has_none(self) -> None:
        collapsed = np.repeat(np.random.default_rng(0).normal(size=(3, 8)) * 1e3, 4, axis=0)
        assert intra_prompt_diversity(collapsed, np.repeat(np.arange(3), 4)) == 0.0

    def test_is_the_mean_distance_within_and_not_between_prompts(self) -> None:
        features = np.array([[0.0], [1.0], [3.0], [100.0], [104.0]])
        groups = np.array([0, 0, 0, 1, 1])
        # prompt 0: (1 + 3 + 2) / 3 = 2; prompt 1: 4; prompts count equally
        assert intra_prompt_diversity(features, groups) == 3.0

    def test_does_not_depend_on_the_order_of_rows(self) -> None:
        rng = np.random.default_rng(1)
        features, groups = rng.normal(size=(60, 5)), np.arange(60) % 4
        order = rng.permutation(60)
        shuffled = intra_prompt_diversity(features[order], groups[order])
        assert shuffled == pytest.approx(intra_prompt_diversity(features, groups), rel=1e-12)

    def test_standard_normals_are_two_over_root_pi_apart(self) -> None:
        features = np.random.default_rng(2).normal(size=(4000, 1))
        found = intra_prompt_diversity(features, np.arange(4000) % 2)
        assert found == pytest.approx(2 / math.sqrt(math.pi), rel=0.02)

    def test_a_prompt_with_one_picture_is_refused(self) -> None:
        with pytest.raises(ShapeError, match="group 7 has one picture"):
            intra_prompt_diversity(np.zeros((3, 2)), np.array([1, 1, 7]))


class TestParity:
    def picture(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)

    def test_equal_pictures_are_perfect(self) -> None:
        found = image_parity(self.picture(), self.picture())
        assert found.psnr_db == math.inf
        assert found.ssim == 1.0

    def test_an_error_of_one_level_everywhere_is_48_db(self) -> None:
        base = np.full((16, 16, 3), 100, np.uint8)
        found = image_parity(base, base + np.uint8(1))
        assert found.psnr_db == pytest.approx(20 * math.log10(255), abs=1e-9)
        assert found.ssim > 0.999

    def test_floats_use_their_own_peak(self) -> None:
        base = np.full((16, 16, 3), 0.5)
        found = image_parity(base, base + 0.1, peak=1.0)
        assert found.psnr_db == pytest.approx(20.0, abs=1e-9)

    def test_a_batch_is_judged_by_its_worst_picture(self) -> None:
        good = np.stack([self.picture(), self.picture()])
        other = good.copy()
        other[1] = 255 - other[1]
        found = worst_parity(good, other)
        assert found == image_parity(good[1], other[1])
        assert found.ssim < 0.0

    def test_bad_shapes_are_refused(self) -> None:
        with pytest.raises(ShapeError, match="twice"):
            image_parity(np.zeros((16, 16, 3)), np.zeros((16, 15, 3)))
        with pytest.raises(ShapeError, match="7 px"):
            image_parity(np.zeros((6, 16, 3)), np.zeros((6, 16, 3)))
        with pytest.raises(ShapeError, match="N, H, W, C"):
            worst_parity(np.zeros((0, 16, 16, 3)), np.zeros((0, 16, 16, 3)))

    def test_a_missing_library_is_named_with_its_extra(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "skimage.metrics", None)
        with pytest.raises(MissingExtraError, match=r"fewstep\[export\]"):
            image_parity(self.picture(), self.picture())
