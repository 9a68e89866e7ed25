"""FlashInfer's names and semantics, served by jitgen."""
