"""The command line; `llmq.cli.app` puts it together."""
