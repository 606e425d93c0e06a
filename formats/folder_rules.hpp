// Rules on the files of a checkpoint folder that its reader and the writer of FireQ folders share. Internal.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fireq::formats {

// Throws Error(input) when FOLDER/NAME is missing, no regular file or a link that leads out of the folder. A
// checkpoint from a stranger must not make this program read another file of the user's. The one shape of
// link that leaves the folder and is let through is that of a Hugging Face cache: snapshots/REVISION/NAME ->
// blobs/HASH.
void check_inside_folder(const std::string& folder, const std::string& name);

// Text of FOLDER/NAME after that check; Error(input) "file not found" when it is missing, see read_text_file.
std::string read_text_inside_folder(const std::string& folder, const std::string& name,
                                    std::uint64_t largest);

// Names of the folder's entries, sorted. Error(environment) when it cannot be listed.
std::vector<std::string> list_names(const std::string& folder);

// The file has an entry in its folder, be it a dangling link.
bool path_exists(const std::string& path);

}  // namespace fireq::formats
