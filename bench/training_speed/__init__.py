"""Speed of training: tokens a second, time of an epoch, memory."""
