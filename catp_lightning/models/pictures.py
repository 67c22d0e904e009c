"""Models that make the same number of tokens of every picture, crops included."""

from catp_lightning.models.placeholder import Placeholder


class Pictures(Placeholder):
    """Models in whose prompts every picture, a crop too, has a run of tokens of its own, all equally long."""

    types = (
        "aria",
        "aya_vision",
        "cohere2_vision",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "fast_vlm",
        "got_ocr2",
        "janus",
        "ovis2",
        "pp_chart2table",
        "qianfan_ocr",
    )
    classes = (
        "AriaForConditionalGeneration",
        "AyaVisionForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "DeepseekVLForConditionalGeneration",
        "DeepseekVLHybridForConditionalGeneration",
        "FastVlmForConditionalGeneration",
        "GotOcr2ForConditionalGeneration",
        "JanusForConditionalGeneration",
        "Ovis2ForConditionalGeneration",
        "QianfanOCRForConditionalGeneration",
    )
