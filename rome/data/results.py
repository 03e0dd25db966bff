"""The row that every (run, editor, case_id) leaves behind, as an Arrow schema.

Probabilities are stored per prompt and per target as mean negative log-likelihoods over the
target's tokens (natural log), so that every metric can be computed again without a model.
`rome.analysis.summary` derives ES..NM from them.
"""

import pyarrow as pa

from rome.data.probes import PROBE_FIELDS

PROMPT_KINDS = ("rewrite", "paraphrase", "neighborhood", "attribute")
# The neighborhood prompts after the edited sentence, and the subject after the reversed prompt with
# either target: None unless the run's `scoring` asks for them.
EXTRA_KINDS = ("neighborhood_plus", "reversed")
# The kinds whose prompts one target answers.
TOLD_KINDS = ("rewrite", "paraphrase", "neighborhood")

OK = "ok"
ERROR = "error"

_nlls = [
    pa.field(f"{kind}_nll_{target}", pa.list_(pa.float64()))
    for kind in (*PROMPT_KINDS, *EXTRA_KINDS)
    for target in ("new", "true")
]

_FURTHER = [pa.field(name, pa.string()) for name in ("prompt", "subject", "target", "target_true")]
_PROBES = [
    *PROBE_FIELDS,
    pa.field("nll", pa.list_(pa.float64())),
    pa.field("accuracy", pa.list_(pa.float64())),
    pa.field("greedy", pa.string()),
    pa.field("wild", pa.string()),
]

RESULT_SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("relation_id", pa.string()),
        pa.field("subject", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("target_new", pa.string()),
        # None where the benchmark has questions, whose neighbors have an answer each.
        pa.field("target_true", pa.string()),
        pa.field("neighborhood_targets", pa.list_(pa.string())),
        # The requests after the first, where a record has several; the lists of the rewrite kind
        # have one entry per request.
        pa.field("further", pa.list_(pa.struct(_FURTHER))),
        # What the benchmark's file calls the record, where that is not `case_id`.
        pa.field("original_id", pa.string()),
        # raw, or which prompts stood in the tokenizer's chat template: see RunConfig.
        pa.field("prompt_template", pa.string()),
        # In a chain: which order of its records, the edits in the model that is scored, and those
        # of them that came after the record's own batch.
        pa.field("order", pa.int32()),
        pa.field("edits", pa.int32()),
        pa.field("age", pa.int32()),
        # What stood between prompts and targets: a space, or nothing.
        pa.field("separator", pa.string()),
        # OK, or ERROR for a dead letter: then `error` says why and the numbers are null.
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        *_nlls,
        # Which of EXTRA_KINDS a record is too long for, and why.
        pa.field("omitted", pa.string()),
        # Per prompt: the share of the target's tokens that are the likeliest under teacher forcing.
        # Of target_new, but of the true target after neighborhood prompts; so is what is greedily
        # said, up to a natural stop: see rome.scoring.greedy.
        *(pa.field(f"{kind}_accuracy", pa.list_(pa.float64())) for kind in TOLD_KINDS),
        # In zsRE, whose published numbers are of another way (rome.scoring.released), of the true
        # tokens.
        *(pa.field(f"{kind}_accuracy_tokens", pa.list_(pa.float64())) for kind in TOLD_KINDS),
        *(pa.field(f"{kind}_greedy", pa.list_(pa.string())) for kind in TOLD_KINDS),
        # All that is greedily said, in WILD's form and number of tokens, or up to a special token.
        *(pa.field(f"{kind}_wild", pa.list_(pa.string())) for kind in TOLD_KINDS),
        pa.field("wild_form", pa.string()),
        # Questions of the record's own sets: see rome.data.probes. Numbers are one per answer.
        pa.field("probes", pa.list_(pa.struct(_PROBES))),
        pa.field("texts", pa.list_(pa.string())),
        # Bits; None where the record has no generation prompts.
        pa.field("GE", pa.float64()),
        # Cosine in [0, 1]; None where the store holds no reference texts for the target.
        pa.field("RS", pa.float64()),
        # Health of the edit; None where the editor has no such thing.
        pa.field("edit_steps", pa.int32()),
        pa.field("edit_loss", pa.float64()),
        pa.field("edit_divisor", pa.float64()),
        pa.field("edit_norm", pa.float64()),
        pa.field("edit_key_norm", pa.float64()),
        pa.field("edit_init_norm", pa.float64()),
        pa.field("edit_delta_norm", pa.float64()),
        pa.field("edit_clamp_hits", pa.int32()),
        pa.field("edit_value_norm", pa.float64()),
        pa.field("edit_skipped", pa.int32()),
        pa.field("edit_rank", pa.int32()),
        pa.field("edit_neurons", pa.int32()),
        # Seconds: this record's share of its batch.
        pa.field("seconds_edit", pa.float64()),
        pa.field("seconds_probabilities", pa.float64()),
        pa.field("seconds_greedy", pa.float64()),
        pa.field("seconds_wild", pa.float64()),
        pa.field("seconds_generation", pa.float64()),
        pa.field("worker", pa.string()),
    ]
)

NUMBERS = {
    "edit": [f.name for f in RESULT_SCHEMA if f.name.startswith("edit_") and f.type == "double"],
    "score": [field.name for field in RESULT_SCHEMA if field.type == pa.list_(pa.float64())],
    "text": ["GE", "RS"],
}
"""The columns of numbers that may turn out not to be finite, by what they are of."""

FORMER_SCHEMA = pa.schema([pa.field("neighborhood_target", pa.string())])
"""Columns of earlier versions that still say something: the target of all neighborhood prompts."""
