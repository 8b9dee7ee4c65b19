"""``python -m llmq``: the command line."""

from llmq.cli.app import main

main()
