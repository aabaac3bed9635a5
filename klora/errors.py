"""The errors a user may read. Each carries one sentence: what was wrong, what was seen, what is accepted.

KLoRAError (ValueError)
├── RequestError      an input, or two inputs together, cannot be honoured
├── SourceError       a LoRA reference cannot be understood, or what it names cannot be fetched
├── LoRAError         a LoRA file cannot be read, or not for this base
├── BaseModelError    a base model is not installed, or its folder is damaged
└── SafetyError       the safety checker is missing, or withheld every image
"""


class KLoRAError(ValueError):
    """Anything that the user, not the programmer, can put right."""


class RequestError(KLoRAError):
    """Raised when an input, or two inputs together, cannot be honoured."""


class SourceError(KLoRAError):
    """Raised when a reference to a LoRA cannot be understood, or what it names cannot be fetched."""


class LoRAError(KLoRAError):
    """Raised when a file is no LoRA that this project can apply exactly to the base in question."""


class BaseModelError(KLoRAError):
    """Raised when a base model is not installed or cannot be loaded."""


class SafetyError(KLoRAError):
    """Raised when images cannot be checked, or when none of them may be shown."""
