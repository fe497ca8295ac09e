"""What several test files share: tiny models and data, runs of several ranks, adapters by PEFT, published shapes."""
