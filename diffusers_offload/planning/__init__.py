"""What is decided before anything moves, over plain data: plans, times, and which units stay."""
