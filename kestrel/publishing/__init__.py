"""The adapter for others: what is published, the card, the upload, the merged model."""
