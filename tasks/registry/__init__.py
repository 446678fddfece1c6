"""What is published in the artifact store: versions, and the log of promotions that names the champion."""
