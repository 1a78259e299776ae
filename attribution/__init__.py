"""What was served, who made it, what they are owed: integers, hashes and signatures an auditor can replay alone."""
