"""Measure which visual tokens the trained model can do without, and save a policy for each budget.

python examples/easy_vqa/calibrate.py            # writes runs/easy_vqa/policies
"""

from lightning.pytorch import seed_everything
from project import KEEPS, options, read_data, read_model, trainer

from catp_lightning import CrossAttentionCalibration


def main() -> None:
    out = options(__doc__).out
    seed_everything(0)
    calibration = CrossAttentionCalibration(out / "policies", keep=KEEPS)
    trainer(calibration).predict(read_model(out), read_data(out).calibration_dataloader())


if __name__ == "__main__":
    main()
