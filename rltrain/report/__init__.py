"""One self-contained HTML page about runs: what was run and learnt, what to beware of, which token got which credit.

python -m rltrain.report RUN [RUN …] [--out FILE] [--estimators grpo,tempo]
"""
