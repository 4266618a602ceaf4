"""What fewer bits cost and buy: accuracy, size and time of quantised layers, item tables and runs."""
