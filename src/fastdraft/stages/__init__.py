"""The ten stages of a recipe. Each module has `fingerprint(config, context)` and `run(config, context)`;
pipeline.py puts them in order.
"""

# Here, and not beside the modules in pipeline.py, so that `--help` shows them without loading torch.
SUMMARIES = {
    "design": "target -> draft architecture and first weights",
    "prepare": "corpora -> tokenised, packed shards",
    "pretrain": "text shards -> a language model",
    "continue_pretrain": "code and text shards -> a model of both",
    "synthesize": "prompts -> responses that the target writes",
    "align": "responses -> a draft that predicts this target",
    "evaluate": "draft x target x tasks -> acceptance, block efficiency",
    "export": "the draft as runtimes load it",
    "benchmark": "the exported pair on this device's clock, beside the prediction",
    "report": "everything on one page",
}
# Those whose work many machines share.
SPREAD = ("prepare", "synthesize", "evaluate")
