//! What a look at a dataset turns up: one file, what is the matter with it, and what to do.

use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident $name:literal $weight:ident $remedy:literal;)*) => {
        /// What is the matter.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum FindingKind { $($(#[$doc])* $variant),* }

        impl FindingKind {
            /// Its name in JSON and in tables.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// By its name.
            pub(crate) fn of_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }

            /// What to do about it.
            pub fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy),* }
            }

            /// How much it matters.
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$weight),* }
            }
        }
    };
}

kinds! {
    /// A picture that cannot be read, and is left out.
    Unreadable "unreadable" Lost "replace the file or remove it";
    /// A folder that cannot be read.
    UnreadableFolder "unreadable-folder" Lost "give read permission, or remove it";
    /// A link that leads back to a folder above it.
    FolderLoop "folder-loop" Lost "remove the link";
    /// A caption or metadata file, or a line of one, that cannot be used.
    CaptionFile "caption-file" Lost "correct the file as the message says";
    /// A caption without a picture.
    OrphanCaption "orphan-caption" Advice "rename it to its picture's name, or remove it";
    /// Pictures of one name with different extensions share captions and masks.
    DuplicateStem "duplicate-stem" Warning "keep one of them, or rename";
    /// The content is of another format than the extension says; other tools may refuse it.
    WrongExtension "wrong-extension" Advice "rename it to what it is";
    /// A name that is not UTF-8: metadata files cannot name it.
    NameEncoding "name-encoding" Advice "rename the file";
    /// A folder that was not read.
    FolderIgnored "folder-ignored" Warning "set recursive = true, or name it N_name (N repeats) in a folder without pictures";
    /// A picture beside `N_name` folders, which was not read.
    PictureIgnored "picture-ignored" Lost "move it into one of the N_name folders or elsewhere, or set recursive = true";
    /// The folder's own name has repeats and a caption in it, which count only below a folder that is given.
    FolderNumber "folder-number" Warning "give its parent folder, or set repeats and class_tokens";
    /// A picture without a caption.
    MissingCaption "missing-caption" Warning "write a caption, or set trigger_word";
    /// A caption file without text.
    EmptyCaption "empty-caption" Warning "write a caption, or set trigger_word";
    /// A caption longer than the model reads.
    LongCaption "long-caption" Warning "shorten it, or raise max_token_length";
    /// Several pictures with the same caption.
    DuplicateCaption "duplicate-caption" Advice "say what differs between the pictures";
    /// The same file again.
    ExactDuplicate "exact-duplicate" Warning "remove one; use repeats to weigh a picture more";
    /// Nearly the same picture again.
    NearDuplicate "near-duplicate" Warning "keep the better one, unless the repetition is meant";
    /// Blurred.
    Blurred "blurred" Warning "replace it: blur is learned as part of the style";
    /// Smaller than it is trained at.
    LowResolution "low-resolution" Warning "replace it, lower max_resolution, or set bucket_no_upscale = true";
    /// Too small for any bucket.
    TooSmall "too-small" Lost "enlarge or remove it";
    /// Far from any usual aspect.
    ExtremeAspect "extreme-aspect" Warning "cut it by hand to its subject";
    /// Much is cut away.
    HeavyCrop "heavy-crop" Advice "set enable_bucket = true, use focus_crop, or cut by hand";
    /// Too dark.
    Dark "dark" Advice "brighten or remove it";
    /// Burnt out.
    Bright "bright" Advice "darken or remove it";
    /// A picture whose mask could not be found.
    MissingMask "missing-mask" Advice "add the mask; without one all of the picture counts";
    /// Pictures of several folders have the same mask, because they have the same name.
    SharedMask "shared-mask" Warning "put masks into folders of the names that the pictures' folders have, or give pictures names of their own";
    /// A record of a text dataset that cannot be used.
    TextRecord "text-record" Lost "correct the record as the message says";
    /// A conversation that its chat template refuses.
    TemplateRefused "template-refused" Lost "bring its turns into the form that the template asks for, or choose another chat_template";
    /// A record of which no token is learned.
    NothingLearned "nothing-learned" Lost "give it an answer, or set train_on_inputs = true";
    /// A record that is left out because it is too long.
    TextSkipped "text-skipped" Lost "raise max_seq_length, or set long_documents = split";
    /// A record of which the end is cut off.
    TextCut "text-cut" Warning "raise max_seq_length, or set long_documents = split";
    /// A record that became several rows.
    TextSplit "text-split" Advice "raise max_seq_length where the pieces need each other";
    /// A key of a record that says something and has no place in the record's form.
    UnreadKey "unread-key" Warning "bring it into a form that is read (docs/datasets.md), or remove it";
    /// A special token in what somebody says.
    SpecialToken "special-token" Warning "remove it, unless it is meant: it acts as that token wherever it is written";
    /// An answer without words.
    EmptyAnswer "empty-answer" Warning "write the answer, or remove the record: silence is learned";
    /// The same record again.
    DuplicateText "duplicate-text" Warning "remove one; use repeats to weigh a dataset more";
    /// An answer that no special token ends.
    EndlessAnswer "endless-answer" Warning "choose a chat_template that ends a turn with a special token";
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something is not used.
    Lost,
    /// Training will probably suffer.
    Warning,
    /// Worth a look.
    Advice,
}

impl Severity {
    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Lost => "lost",
            Severity::Warning => "warning",
            Severity::Advice => "advice",
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// The file or folder.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// What is the matter.
    pub kind: FindingKind,
    /// The particulars.
    pub detail: String,
}

impl Finding {
    pub(crate) fn new(path: impl Into<PathBuf>, kind: FindingKind, detail: impl Into<String>) -> Self {
        Self { path: path.into(), kind, detail: detail.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.path.display(), self.kind.name(), self.detail)
    }
}

impl Serialize for FindingKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A path as JSON has it; serde's signature.
pub(crate) fn lossy<S: Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}
