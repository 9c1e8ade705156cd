"""scvi-tools: fast classes train, save and predict as the originals; log p(x) of cells is right."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import scvi
import torch
from scvi.distributions import NegativeBinomial
from scvi.distributions._negative_binomial import log_nb_positive, log_zinb_positive
from torch.nn.utils import parameters_to_vector

from fastvae.integrations import scvi as ours
from fastvae.integrations.scvi import evaluate, fast

SCVI, LinearSCVI, SCANVI, TOTALVI = (
    scvi.model.SCVI,
    scvi.model.LinearSCVI,
    scvi.model.SCANVI,
    scvi.model.TOTALVI,
)
# Warnings of scvi-tools and lightning, such as of few batches.
pytestmark = pytest.mark.filterwarnings("ignore")

CELLS, GENES, PROTEINS = 300, 100, 4
EPOCHS, WARM_UP = 8, 5
KEYS = {"batch_key": "batch", "labels_key": "label"}


@pytest.fixture(autouse=True)
def quiet(one_thread):
    """Silence the reports of lightning and scvi-tools."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def cells():
    """Return simulated cells of three kinds in two batches; one batch lacks a protein."""
    draw = np.random.default_rng(0)
    kind, batch = draw.integers(3, size=CELLS), draw.integers(2, size=CELLS)
    profile = np.exp(1.2 * draw.standard_normal((3, GENES)) + 0.3 * draw.standard_normal((2, 1, GENES)))
    profile /= profile.sum(-1, keepdims=True)
    mean = profile[batch, kind] * 200 * np.exp(0.4 * draw.standard_normal((CELLS, 1)))
    data = anndata.AnnData(draw.poisson(draw.gamma(2.0, mean / 2.0)).astype(np.float32))
    data.obs["batch"], data.obs["label"] = batch.astype(str), kind.astype(str)
    data.obs["covariate"], data.obs["age"] = draw.integers(2, size=CELLS).astype(str), draw.random(CELLS)
    data.obs["size"] = 150.0 + draw.random(CELLS)
    proteins = draw.poisson(20.0, (CELLS, PROTEINS)).astype(np.float32)
    proteins[batch == 1, 0] = 0
    data.obsm["protein"] = proteins
    return data


def build(model_class, data, keys=KEYS, **options):
    """Return a model with weights from a fixed seed."""
    scvi.settings.seed = 0
    model_class.setup_anndata(data, **keys)
    return model_class(data, **options)


def train(model, epochs=EPOCHS, **plan):
    options = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "train_size": 1.0,
        "log_every_n_steps": 1,
    }
    model.train(max_epochs=epochs, plan_kwargs={"n_epochs_kl_warmup": WARM_UP, **plan}, **options)
    return model


def weights(model):
    return parameters_to_vector(model.module.parameters()).detach().clone()


def elbo(model):
    scvi.settings.seed = 1
    return float(model.get_elbo())


def step(model, data, **options):
    """Return the loss of a batch of all cells, and its gradients."""
    module = model.module.train()
    batch = next(iter(model._make_data_loader(data, batch_size=CELLS)))
    torch.manual_seed(3)
    loss = module(batch, loss_kwargs={"kl_weight": 0.3, **options})[2]
    loss.loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss, found


def assert_same_step(theirs, fast_model, data):
    """Assert that losses agree to 2e-6, and gradients to 1e-5 of the whole gradient."""
    (a, grads_a), (b, grads_b) = step(theirs, data), step(fast_model, data)
    torch.testing.assert_close(a.loss, b.loss, rtol=2e-6, atol=0)
    for name, value in a.reconstruction_loss.items():
        torch.testing.assert_close(b.reconstruction_loss[name], value, rtol=1e-5, atol=1e-3)
    assert grads_a.keys() == grads_b.keys()
    size = math.sqrt(sum(float(g.square().sum()) for g in grads_a.values()))
    for name, gradient in grads_a.items():
        assert float((gradient - grads_b[name]).norm()) < 1e-5 * size, name
        if name == "px_r":
            # Small, and a sum over cells: compared by itself.
            torch.testing.assert_close(grads_b[name], gradient, rtol=1e-3, atol=1e-4)


# The formula


@pytest.mark.parametrize("inflated", [False, True])
def test_a_gene_differs_by_at_most_epsilon(inflated):
    """Means from 1e-12 to 1e5, dispersions from 1e-6 to 1e6, and logits of both signs, in float64."""
    x, mu, theta, logit = torch.cartesian_prod(
        torch.tensor([0.0, 1, 2, 7, 50, 1000], dtype=torch.float64),
        10 ** torch.linspace(-12, 5, 18, dtype=torch.float64),
        10 ** torch.linspace(-6, 6, 25, dtype=torch.float64),
        torch.tensor([-30.0, -3, -1, 0, 1, 3, 30], dtype=torch.float64),
    ).mT[..., None]
    given = (mu, theta, logit) if inflated else (mu, theta)
    theirs = (log_zinb_positive if inflated else log_nb_positive)(x, *given)[:, 0]
    difference = theirs - ours._log_prob(x, mu, theta.log(), *given[2:])
    # The rounding of lgamma of 1e6.
    assert difference.min() > -5e-9 and difference.max() < ours.EPS + 5e-9
    if not inflated:
        exact = (theta * torch.log1p(ours.EPS / theta))[:, 0]
        torch.testing.assert_close(difference, exact, rtol=0, atol=5e-9)


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_a_step_is_the_same(kind, dispersion):
    data = cells()
    options = {"gene_likelihood": kind, "dispersion": dispersion}
    models = [build(c, data, **options) for c in (SCVI, fast(SCVI))]
    # A gene's mean of some 1e-16, which 1e-8 replaces; the Poisson distribution has no epsilon.
    for model in models if kind != "poisson" else []:
        with torch.no_grad():
            model.module.decoder.px_scale_decoder[0].bias[3] = -40
    assert_same_step(*models, data)


def test_a_rate_of_zero_has_a_gradient():
    """A count of 0 at a rate of 0 has a finite gradient; scvi-tools' is NaN."""
    data = cells()
    data.X[:, 3] = 0
    model = build(fast(SCVI), data, gene_likelihood="poisson")
    with torch.no_grad():
        model.module.decoder.px_scale_decoder[0].bias[3] = -200
    assert all(bool(g.isfinite().all()) for g in step(model, data)[1].values())


def test_covariates_and_size_factors():
    keys = {
        **KEYS,
        "categorical_covariate_keys": ["covariate"],
        "continuous_covariate_keys": ["age"],
        "size_factor_key": "size",
    }
    data = cells()
    options = {"encode_covariates": True, "latent_distribution": "ln", "batch_representation": "embedding"}
    assert_same_step(*(build(c, data, keys, **options) for c in (SCVI, fast(SCVI))), data)


def test_a_linear_decoder():
    data = cells()
    keys = {"batch_key": "batch"}
    assert_same_step(*(build(c, data, keys) for c in (LinearSCVI, fast(LinearSCVI))), data)


def test_labels_in_part():
    data = cells()
    keys = {**KEYS, "unlabeled_category": "0"}
    assert_same_step(*(build(c, data, keys) for c in (SCANVI, fast(SCANVI))), data)


@pytest.mark.parametrize("options", [{}, {"gene_likelihood": "zinb", "gene_dispersion": "gene-batch"}])
def test_genes_and_proteins(options):
    """Proteins that a batch lacks are left out of both."""
    data = cells()
    keys = {"batch_key": "batch", "protein_expression_obsm_key": "protein"}
    models = [build(c, data, keys, **options) for c in (TOTALVI, fast(TOTALVI))]
    assert models[0].module.protein_batch_mask is not None
    assert_same_step(*models, data)


# Training


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_trained_weights_are_the_same(kind):
    data = cells()
    theirs = build(SCVI, data, gene_likelihood=kind)
    first = weights(theirs)
    train(theirs)
    quick = train(build(fast(SCVI), data, gene_likelihood=kind))
    apart, moved = (weights(quick) - weights(theirs)).norm(), (weights(theirs) - first).norm()
    assert moved > 1 and apart < 1e-4 * moved
    assert elbo(quick) == pytest.approx(elbo(theirs), rel=1e-5)


def test_the_warm_up_is_in_force():
    model = train(build(fast(SCVI), cells()))
    found = model.history["kl_weight"].to_numpy(dtype=float).ravel()
    expected = np.minimum(np.arange(EPOCHS) / WARM_UP, 1)
    np.testing.assert_allclose(found.reshape(EPOCHS, -1).T, [expected] * (len(found) // EPOCHS), atol=1e-6)
    other = train(build(fast(SCVI), cells()), n_epochs_kl_warmup=None)
    assert (weights(model) - weights(other)).norm() > 0.1


@pytest.mark.parametrize("model_class", [SCVI, LinearSCVI, SCANVI, TOTALVI])
def test_signatures_are_the_same(model_class):
    theirs, quick = model_class._module_cls, fast(model_class)._module_cls
    assert quick is not theirs
    assert inspect.signature(quick.loss) == inspect.signature(theirs.loss)
    assert "kl_weight" in inspect.signature(quick.loss).parameters


def test_labels_after_training_without():
    data = cells()
    pretrained = train(build(fast(SCVI), data), epochs=1)
    model = fast(SCANVI).from_scvi_model(pretrained, unlabeled_category="0")
    assert type(model) is fast(SCANVI)
    train(model, epochs=1)
    assert model.predict().shape == (CELLS,)


# Everything else of the model


@pytest.fixture(scope="module")
def trained():
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = cells()
    model = build(fast(SCVI), data, gene_likelihood="nb", n_latent=2, dropout_rate=0.0)
    return train(model, epochs=150, lr=1e-2), data


def test_the_class_is_a_subclass_made_once():
    quick = fast(SCVI)
    assert quick is fast(SCVI) and fast(quick) is quick and issubclass(quick, SCVI)
    assert repr(quick) == "<class 'fastvae.integrations.scvi.fast(SCVI)'>"
    assert quick.__doc__ == SCVI.__doc__


def test_either_class_loads_the_others_files(trained, tmp_path):
    model, data = trained
    model.save(tmp_path / "fast")
    theirs = SCVI.load(tmp_path / "fast", data)
    assert type(theirs) is SCVI and torch.equal(weights(theirs), weights(model))
    theirs.save(tmp_path / "theirs")
    again = fast(SCVI).load(tmp_path / "theirs", data)
    assert type(again) is fast(SCVI) and torch.equal(weights(again), weights(model))
    assert elbo(again) == elbo(model)


def test_copies_are_fast(trained):
    model, _ = trained
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and type(other.module) is type(model.module)
        assert torch.equal(weights(other), weights(model))


def test_data_are_set_up_for_both():
    data = cells()
    SCVI.setup_anndata(data, **KEYS)
    assert fast(SCVI)(data).adata is data


def test_predictions_are_the_same(trained, tmp_path):
    """Outside the loss p(x|z) is the original distribution; within, the marginal likelihood is the same."""
    model, data = trained
    model.save(tmp_path / "model")
    theirs, found = SCVI.load(tmp_path / "model", data), []
    for m in (theirs, model):
        scvi.settings.seed = 4
        samples = m.posterior_predictive_sample(n_samples=2, indices=range(50)).todense()
        marginal = m.get_marginal_ll(n_mc_samples=20, n_mc_samples_per_pass=10, return_mean=False)
        error = m.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
        found.append((samples, marginal, error))
    (samples, *values), (same, *expected) = found
    assert np.array_equal(samples, same)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)


# What is not replaced


class OwnLoss(scvi.module.VAE):
    def loss(self, *args, kl_weight=1.0, **kwargs):
        return super().loss(*args, kl_weight=2 * kl_weight, **kwargs)


def doubled(outputs):
    px = outputs["px"]
    return {**outputs, "px": NegativeBinomial(mu=px.mu, theta=2 * px.theta)}


class OwnGenerative(scvi.module.VAE):
    def generative(self, *args, **kwargs):
        return doubled(super().generative(*args, **kwargs))


def _with(module_class):
    return type("SCVI", (SCVI,), {"_module_cls": module_class})


def test_a_loss_of_the_users_is_refused():
    own = _with(OwnLoss)
    with pytest.raises(TypeError, match="OwnLoss, whose loss is not one of SCVI"):
        fast(own)
    assert own._module_cls is OwnLoss
    for other in (scvi.model.AUTOZI, scvi.model.MULTIVI):
        with pytest.raises(TypeError, match="whose loss is not one of"):
            fast(other)
    with pytest.raises(TypeError, match="must be a model of scvi-tools"):
        fast(scvi.module.VAE)


def test_a_generative_of_the_users_is_read():
    """Its dispersions are not the module's parameters; it may be that of the class or of the instance."""
    data, own = cells(), _with(OwnGenerative)
    for overridden in (own, SCVI):
        models = [build(c, data, gene_likelihood="nb") for c in (own, fast(overridden))]
        if overridden is SCVI:
            theirs = models[1].module.generative
            models[1].module.generative = lambda *a, theirs=theirs, **named: doubled(theirs(*a, **named))
        assert_same_step(*models, data)
        with pytest.raises(TypeError, match="does not override generative, got a SCVI"):
            evaluate(models[1], progress=False)


def test_an_unknown_version_stays_as_it_is(monkeypatch):
    model = build(SCVI, cells())
    monkeypatch.setattr(scvi, "__version__", "9.0.0")
    with pytest.warns(UserWarning, match="not 9.0.0, so SCVI is returned unchanged"):
        assert fast(SCVI) is SCVI
    with pytest.warns(UserWarning, match="not 9.0.0, so log p.* may differ"):
        evaluate(model, indices=range(2), k=2, proposal="posterior", progress=False)


def test_minified_data_are_refused():
    data = cells()
    model = train(build(fast(SCVI), data), epochs=1)
    data.obsm["X_latent_qzm"], data.obsm["X_latent_qzv"] = model.get_latent_representation(return_dist=True)
    model.minify_adata()
    with pytest.raises(ValueError, match="minified, without counts"):
        evaluate(model)


def test_normal_likelihoods_stay_as_they_are():
    data = cells()
    theirs, quick = (build(c, data, gene_likelihood="normal") for c in (SCVI, fast(SCVI)))
    expected, _ = step(theirs, data)
    with pytest.warns(UserWarning, match="no fused op for Normal"):
        found, _ = step(quick, data)
    assert torch.equal(found.loss, expected.loss)


def test_negative_counts_raise():
    data = cells()
    model = build(fast(SCVI), data, log_variational=False)
    data.X[0, 0] = -1
    with pytest.raises(ValueError, match="at or above 0"):
        step(model, data)


def test_importing_fastvae_does_not_import_scvi_tools():
    code = "import sys, fastvae, fastvae.integrations.scvi; sys.exit('scvi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The marginal likelihood


def quadrature(model, data, cell):
    """Return log p(x) of a cell by the trapezoidal rule on a grid of two latents, in float64."""
    module, spacing = model.module.eval(), 0.04
    axis = torch.arange(-6, 6 + spacing / 2, spacing)
    z = torch.cartesian_prod(axis, axis)
    x = torch.from_numpy(data.X[cell]).double()
    batch = torch.full((len(z), 1), int(data.obs["_scvi_batch"].iloc[cell]))
    library = x.sum().log().float().expand(len(z), 1)
    given = torch.softmax(z, 1) if module.latent_distribution == "ln" else z
    with torch.no_grad():
        px = module.generative(given, library, batch)["px"]
        log_px = log_nb_positive(x, px.mu.double(), module.px_r.double().exp()).sum(1)
    log_pz = -0.5 * z.double().square().sum(1) - math.log(2 * math.pi)
    return float(torch.logsumexp(log_px + log_pz, 0)) + 2 * math.log(spacing)


def assert_exact(model, data, result, indices):
    exact = torch.tensor([quadrature(model, data, i) for i in indices], dtype=torch.float64)
    apart = (result.log_px[indices] - exact).abs()
    assert bool((apart < 5 * result.log_px_stderr[indices] + 1e-3).all()), apart


def test_log_p_of_cells_is_the_integral_over_latents(trained):
    model, data = trained
    result = evaluate(model, indices=range(60), k=2000, progress=False)
    assert result.log_px.shape == result.khat.shape == (60,) and bool(result.khat.isfinite().all())
    assert result.untrusted < 0.1
    mean, variance = model.get_latent_representation(indices=range(60), return_dist=True)
    kl = 0.5 * (variance + mean**2 - 1 - np.log(variance)).mean(0)
    np.testing.assert_allclose(result.kl_per_dim, kl, rtol=1e-4)
    assert_exact(model, data, result, [0, 7, 15, 28])


def test_log_p_of_cells_with_a_logistic_normal():
    data = cells()
    options = {"gene_likelihood": "nb", "latent_distribution": "ln", "n_latent": 2}
    model = train(build(fast(SCVI), data, **options), lr=1e-2)
    assert_exact(model, data, evaluate(model, indices=range(30), k=2000, progress=False), [0, 7])


def test_log_p_of_cells_is_that_of_get_marginal_ll(trained):
    """Draws from q give the same number for cells where both can be trusted."""
    model, _ = trained
    some = {"indices": range(60)}
    result = evaluate(model, **some, k=500, proposal="posterior", progress=False)
    theirs = model.get_marginal_ll(**some, n_mc_samples=500, n_mc_samples_per_pass=50, return_mean=False)
    trusted = result.khat < 0.5
    assert trusted.sum() > 10
    error = math.sqrt(2 * float(result.log_px_stderr[trusted].square().mean() / trusted.sum()))
    assert float((result.log_px - theirs)[trusted].mean()) == pytest.approx(0, abs=5 * error + 1e-3)


def without_latents(model):
    """Make q(z|x) the prior, and p(x|z) independent of z."""
    module = model.module.eval()
    latents = module.n_latent
    with torch.no_grad():
        for layer in (module.z_encoder.mean_encoder, module.z_encoder.var_encoder):
            layer.weight.zero_()
            layer.bias.zero_()
        module.decoder.px_decoder.fc_layers[0][0].weight[:, :latents] = 0


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"gene_likelihood": "zinb", "dispersion": "gene-batch"}, {"continuous_covariate_keys": ["age"]}),
        ({"gene_likelihood": "zinb"}, {"categorical_covariate_keys": ["covariate"]}),
        ({"gene_likelihood": "nb", "dispersion": "gene-label"}, {}),
        ({"gene_likelihood": "nb", "dispersion": "gene-cell"}, {}),
        ({"gene_likelihood": "poisson"}, {"size_factor_key": "size"}),
        ({"gene_likelihood": "normal"}, {}),
    ],
)
def test_every_likelihood_gets_the_conditions_of_its_cell(options, keys):
    """Without an influence of z, scvi-tools' estimate is exact for any draws."""
    data = cells()
    model = build(SCVI, data, {**KEYS, **keys}, **options)
    without_latents(model)
    result = evaluate(model, k=10, proposal="posterior", progress=False)
    theirs = model.get_marginal_ll(n_mc_samples=10, n_mc_samples_per_pass=10, return_mean=False)
    torch.testing.assert_close(result.log_px, theirs.double(), rtol=2e-5, atol=1e-3)


def test_a_library_size_is_integrated_over():
    """Without an influence of z, log p(x) is an integral over the log library size alone."""
    data = cells()
    model = build(LinearSCVI, data, {"batch_key": "batch"}, n_latent=3)
    module = model.module.eval()
    with torch.no_grad():
        module.decoder.factor_regressor.fc_layers[0][0].weight[:, :3] = 0
        for layer in (module.z_encoder.mean_encoder, module.z_encoder.var_encoder):
            layer.weight.zero_()
            layer.bias.zero_()
    result = evaluate(model, indices=range(20), k=4000, progress=False)
    spacing = 0.002
    library = torch.arange(2, 9, spacing)[:, None]
    for cell in (0, 7, 13):
        x = torch.from_numpy(data.X[cell]).double()
        batch = torch.full((len(library), 1), int(data.obs["_scvi_batch"].iloc[cell]))
        with torch.no_grad():
            px = module.generative(torch.zeros(len(library), 3), library, batch)["px"]
            log_px = log_nb_positive(x, px.mu.double(), module.px_r.double().exp()).sum(1)
        mean, variance = (
            moments[0, batch[0, 0]].double()
            for moments in (module.library_log_means, module.library_log_vars)
        )
        log_pl = torch.distributions.Normal(mean, variance.sqrt()).log_prob(library[:, 0].double())
        exact = float(torch.logsumexp(log_px + log_pl, 0)) + math.log(spacing)
        assert float(result.log_px[cell]) == pytest.approx(
            exact, abs=5 * float(result.log_px_stderr[cell]) + 2e-3
        )


def test_models_without_such_a_marginal_are_refused():
    data = cells()
    scanvi = build(SCANVI, data, {**KEYS, "unlabeled_category": "0"})
    totalvi = build(TOTALVI, data, {"batch_key": "batch", "protein_expression_obsm_key": "protein"})
    for model in (scanvi, totalvi, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"got a {type(model).__name__}: its p"):
            evaluate(model)


# The documentation

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_runs():
    text = (DOCS / "integrations" / "scvi.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    space: dict = {}
    exec(block, space)
    assert space["result"].log_px.shape == (80,) and space["suspect"].size < 8


def test_the_example_runs(capsys):
    """The estimate of adapted draws is the higher one, by far more than its error, and can be trusted."""
    runpy.run_path(str(DOCS / "examples" / "single_cells.py"), run_name="__main__")
    ours_, share, theirs = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"log p\(x\) of 100 held-out cells: (-\d+\.\d\d) ± (\d\.\d\d) nats", ours_)
    assert found is not None and -415 < float(found[1]) < -403
    assert float(re.fullmatch(r"k-hat above 0.7, .*: (\d+\.\d)% of the cells", share)[1]) < 10
    assert float(re.search(r": (-\d+\.\d\d) nats$", theirs)[1]) < float(found[1]) - 0.5


def test_cells_with_a_known_truth():
    """Draws of q estimate what scvi-tools' do, adapted ones no less, and the truth is above both."""
    from docs.experiments import cells

    lines = cells.rows(300, 30, train=260, epochs=5, k=400)
    assert [line["likelihood"] for line in lines] == list(cells.LIKELIHOODS)
    for line in lines:
        theirs, q, adapted = (float(line[name]) for name in ("get_marginal_ll", "posterior", "adapted"))
        assert abs(theirs - q) < 1.0 and q - 0.2 < adapted < float(line["truth"])
        assert float(line["below the truth"]) == pytest.approx(float(line["truth"]) - adapted, abs=0.02)
