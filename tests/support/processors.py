"""Which processors the installed transformers can load."""

import pytest
import transformers

needs_processors_of_qwen = pytest.mark.skipif(
    getattr(transformers.AutoImageProcessor, "is_dummy", False),
    reason="this transformers loads processors of Qwen's kind only beside torchvision",
)
