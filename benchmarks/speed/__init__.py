"""What running and calibrating take: seconds and memory."""
