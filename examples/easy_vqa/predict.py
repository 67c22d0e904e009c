"""Test and predict on a share of the visual tokens.

python examples/easy_vqa/predict.py --keep 0.25  # writes runs/easy_vqa/answers.jsonl
"""

from project import options, read_data, read_model, trainer

from catp_lightning import AnswerWriter, TokenPruning


def main() -> None:
    given = options(__doc__, keep=0.25)
    module, data = read_model(given.out), read_data(given.out)
    running = trainer(TokenPruning(given.out / "policies", keep=given.keep), AnswerWriter(given.out / "answers.jsonl"))
    running.test(module, data)
    running.predict(module, data)


if __name__ == "__main__":
    main()
