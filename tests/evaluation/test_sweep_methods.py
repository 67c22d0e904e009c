"""Methods of a sweep by their names."""

from catp_lightning.data import shipped
from catp_lightning.evaluation.sweep.methods import fixed_methods
from catp_lightning.models import find_family
from catp_lightning.modules.vqa import VQAModule


def test_attention_scorers_are_asked_layer_by_layer_where_that_is_wished() -> None:
    family = find_family(VQAModule(str(shipped("digits_llava"))))
    names = ["fastv", "fastervlm", "pyramiddrop", "stride", "catp"]
    plain, refused_ = fixed_methods(names, family, layers=False)
    assert [job.title for job in plain] == names[:4] and refused_.keys() == {"catp"}
    found, refused_ = fixed_methods(names, family, layers=True)
    assert refused_.keys() == {"catp"}
    args = {job.title: job.policy.scorer_args for job in found if "layer" in job.title}
    assert args == {
        **{f"fastv at layer {n}": {"layer": n} for n in (1, 2, 3)},
        **{f"fastervlm layer {n}": {"layers": [n]} for n in (0, 1, 2)},
    }
