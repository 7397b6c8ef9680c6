//! The tags that a tagger knows: their names and categories, in the order of the model's outputs. Which of them become a
//! caption is said in [`crate::choose`].

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The list that lies beside a tagger.
pub(crate) const LIST: &str = "selected_tags.csv";
/// The most bytes that a list of tags may have: the longest published ones have a few megabytes.
const MAX_LIST: u64 = 64 << 20;

/// What a tag says something about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Category {
    /// How explicit the picture is, one of a few.
    Rating,
    /// Who is in the picture.
    Character,
    /// Anything else.
    General,
}

impl Category {
    /// By its number in `selected_tags.csv`, as Danbooru counts: 9 ratings, 4 characters, 0 what is in the picture; copyright
    /// (3), artist (1) and meta (5) count as general.
    fn of_number(number: u32) -> Self {
        match number {
            9 => Category::Rating,
            4 => Category::Character,
            _ => Category::General,
        }
    }
}

/// One tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// Its name with underscores, as in the list.
    pub name: String,
    /// Its category.
    pub category: Category,
}

/// The tags of a tagger, a row of its list each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TagList(pub Vec<Tag>);

impl TagList {
    /// Reads `selected_tags.csv`: a header with `name` and `category`, a row an output of the model.
    ///
    /// # Errors
    /// [`Error::TagList`] where there is no such file, or a row of it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let refused = |reason: String| Error::TagList { path: path.to_owned(), reason };
        let length = std::fs::metadata(path).map_err(|error| refused(format!("cannot open it: {error}")))?.len();
        if length > MAX_LIST {
            return Err(refused(format!("{length} bytes are more than any list of tags has")));
        }
        let mut reader = csv::ReaderBuilder::new()
            .trim(csv::Trim::Headers)
            .from_path(path)
            .map_err(|error| refused(format!("cannot open it: {error}")))?;
        let headers = reader.headers().map_err(|error| refused(error.to_string()))?.clone();
        let column = |name: &str| {
            let found = headers.iter().collect::<Vec<_>>().join(", ");
            let position = headers.iter().position(|header| header.trim_start_matches('\u{feff}') == name);
            position.ok_or_else(|| refused(format!("no column `{name}`; found {found}")))
        };
        let (name, category) = (column("name")?, column("category")?);
        let mut tags = Vec::new();
        for (row, record) in reader.records().enumerate() {
            let record = record.map_err(|error| refused(error.to_string()))?;
            let field = |column: usize| record.get(column).unwrap_or_default().trim();
            let number = field(category).parse().map_err(|_| {
                refused(format!("line {}: expected a number for category, found `{}`", row + 2, field(category)))
            })?;
            tags.push(Tag { name: field(name).to_owned(), category: Category::of_number(number) });
        }
        if tags.is_empty() {
            return Err(refused("it lists no tags".into()));
        }
        Ok(Self(tags))
    }
}

/// What a tagger says of a picture: tags with their probabilities from 0 to 1, by category.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Probabilities {
    /// Ratings, all of them.
    pub rating: BTreeMap<String, f32>,
    /// Characters.
    pub character: BTreeMap<String, f32>,
    /// All other tags.
    pub general: BTreeMap<String, f32>,
}

impl Probabilities {
    /// Of a model's outputs, one a tag. Tags below `least` are left out; ratings are not.
    pub fn of_outputs(tags: &TagList, outputs: &[f32], least: f32) -> Self {
        let mut all = Self::default();
        for (tag, &probability) in tags.0.iter().zip(outputs) {
            let of_category = match tag.category {
                Category::Rating => &mut all.rating,
                Category::Character => &mut all.character,
                Category::General => &mut all.general,
            };
            if tag.category == Category::Rating || probability >= least {
                of_category.insert(tag.name.clone(), probability);
            }
        }
        all
    }

    /// The most probable rating.
    pub fn likeliest_rating(&self) -> Option<&str> {
        self.rating.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(name, _)| name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<TagList> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LIST);
        std::fs::write(&path, text).unwrap();
        TagList::read(&path)
    }

    #[test]
    fn a_list_is_read_by_its_header_and_its_numbers() {
        let list =
            "tag_id,name,category,count\n9999999,general,9,807858\n1,1girl,0,5\n2,hatsune_miku,4,6\n3,\"a,b\",3,1\n";
        let list = read(list).unwrap();
        let expected = [
            ("general", Category::Rating),
            ("1girl", Category::General),
            ("hatsune_miku", Category::Character),
            ("a,b", Category::General),
        ];
        let found: Vec<_> = list.0.iter().map(|tag| (tag.name.as_str(), tag.category)).collect();
        assert_eq!(found, expected);
        let outputs = Probabilities::of_outputs(&list, &[0.01, 0.9, 0.2, 0.04], 0.05);
        assert_eq!(outputs.likeliest_rating(), Some("general"));
        assert_eq!((outputs.general.len(), outputs.character["hatsune_miku"]), (1, 0.2));
    }

    #[test]
    fn a_list_that_cannot_be_one_is_refused_with_what_is_wrong() {
        for (text, said) in [
            ("", "no column `name`"),
            ("name,count\n1girl,3\n", "no column `category`; found name, count"),
            ("name,category\n1girl,x\n", "line 2: expected a number for category, found `x`"),
            ("name,category\n", "no tags"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains(LIST), "{error}");
        }
    }
}
