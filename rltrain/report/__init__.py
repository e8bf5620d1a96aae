"""A self-contained HTML page about runs: settings, learning curves, warnings, and the credit of single tokens.

python -m rltrain.report RUN [RUN …] [--out FILE] [--estimators grpo,tempo]
python -m rltrain.report FOLDER_OF_RUNS      a page per run, and an index of them
"""
