//! The crate's error type.

/// What can go wrong in adapter arithmetic and target matching.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor does not have the shape that its role needs.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// Which tensor.
        what: String,
        /// The shape it should have.
        expected: String,
        /// The shape it has.
        found: String,
    },
    /// A variant lacks one of its tensors.
    #[error("adapter variant `{variant}` needs a tensor `{tensor}`, which is missing")]
    MissingTensor {
        /// The variant.
        variant: String,
        /// The missing tensor.
        tensor: String,
    },
    /// No variant is registered under a name.
    #[error("no adapter variant is called `{name}`; known are {known}")]
    UnknownVariant {
        /// The name asked for.
        name: String,
        /// The registered names.
        known: String,
    },
    /// Two variants want one name.
    #[error("an adapter variant called `{name}` is registered already")]
    DuplicateVariant {
        /// The name.
        name: String,
    },
    /// An option has a value that cannot work.
    #[error("{key} = {value} is impossible: {reason}")]
    Option {
        /// The option.
        key: &'static str,
        /// The value given.
        value: String,
        /// Why it cannot work.
        reason: String,
    },
    /// A target pattern is malformed.
    #[error("`{pattern}` is not a valid pattern: {reason}")]
    Pattern {
        /// The pattern as written.
        pattern: String,
        /// What the parser said.
        reason: String,
    },
    /// A target pattern matches no layer of the model.
    #[error("`{pattern}` matches no layer of this model; {hint}")]
    NoMatch {
        /// The pattern as written.
        pattern: String,
        /// Near names, or what there is.
        hint: String,
    },
    /// A variant cannot adapt a layer of this kind.
    #[error("variant `{variant}` cannot adapt {layer}: {reason}")]
    Unsupported {
        /// Name of the variant.
        variant: String,
        /// The layer.
        layer: String,
        /// Why not, or what can be.
        reason: String,
    },
    /// A merged weight does not determine the base.
    #[error("what variant `{variant}` was merged into cannot be computed back from the result; keep the base")]
    NotReversible {
        /// Name of the variant.
        variant: String,
    },
    /// A decomposition did not converge, which NaN or infinity in its input brings about.
    #[error("{what} did not converge: the matrix holds NaN or infinity")]
    NoConvergence {
        /// What was computed.
        what: &'static str,
    },
    /// The tensor library failed; the source is its own error.
    #[error("tensor backend: {0}")]
    Backend(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
