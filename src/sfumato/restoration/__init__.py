"""Training restoration: pictures and their degradations, scores of what is restored, and the job that joins them."""
