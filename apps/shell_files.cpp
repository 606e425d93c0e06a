#include "apps/shell_files.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <vector>

namespace fireq::apps {
namespace {

struct OptionText {
  std::vector<std::string> names;  // "--json", "-q"
  std::string description;
  std::string value;                 // "FILE"; empty for a flag
  std::vector<std::string> choices;  // when only these values are taken
};
struct CommandText {
  std::string name, description, footer, arguments;
  std::vector<OptionText> options;
};

// "TEXT:{fp,int4}" -> fp, int4. The library keeps the choices in the type's name only.
std::vector<std::string> choices_of(const std::string& type) {
  std::vector<std::string> list;
  const std::size_t open = type.find('{'), close = type.rfind('}');
  if (open == std::string::npos || close == std::string::npos) return list;
  std::size_t begin = open + 1;
  while (begin < close) {
    const std::size_t end = std::min(type.find(',', begin), close);
    list.push_back(type.substr(begin, end - begin));
    begin = end + 1;
  }
  return list;
}

OptionText option_text(const CLI::Option& option) {
  OptionText text;
  for (const std::string& name : option.get_lnames()) text.names.push_back("--" + name);
  for (const std::string& name : option.get_snames()) text.names.push_back("-" + name);
  text.description = option.get_description();
  if (option.get_items_expected_max() > 0) {
    const std::string type = option.get_type_name();
    text.choices = choices_of(type);
    text.value = type.substr(0, type.find(':'));
  }
  return text;
}

std::vector<CommandText> commands_of(const CLI::App& app) {
  std::vector<CommandText> list;
  for (const CLI::App* command : app.get_subcommands({})) {
    CommandText text{command->get_name(), command->get_description(), command->get_footer(), {}, {}};
    for (const CLI::Option* option : command->get_options()) {
      if (option->get_group().empty()) continue;  // --help does not show it either
      if (option->get_positional()) {
        text.arguments += " " + option->get_single_name();
      } else {
        text.options.push_back(option_text(*option));
      }
    }
    list.push_back(std::move(text));
  }
  return list;
}

std::vector<std::string> names_of(const std::vector<CommandText>& commands) {
  std::vector<std::string> names;
  names.reserve(commands.size());
  for (const CommandText& c : commands) names.push_back(c.name);
  return names;
}

std::string replaced(std::string text, const std::string& what, const std::string& by) {
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + by.size()))
    text.replace(at, what.size(), by);
  return text;
}

std::string bash_script(const std::vector<CommandText>& commands) {
  std::string values, options;
  for (const CommandText& c : commands) {
    std::vector<std::string> names;
    for (const OptionText& o : c.options) {
      for (const std::string& name : o.names) {
        if (name.starts_with("--")) names.push_back(name);
        if (!o.choices.empty())
          values += fmt::format("    '{} {}') words='{}' ;;\n", c.name, name, fmt::join(o.choices, " "));
      }
    }
    options += fmt::format("      {}) words='{}' ;;\n", c.name, fmt::join(names, " "));
  }
  return fmt::format(
      R"(# bash completion for fireq: source this file, or put it into bash-completion's folder as "fireq".
_fireq() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=''
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    mapfile -t COMPREPLY < <(compgen -W '{} --help --version' -- "$current")
    return
  fi
  case "${{COMP_WORDS[1]}} $previous" in
{}  esac
  if [[ -z $words && $current == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{}    esac
  fi
  if [[ -n $words ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
  else
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
  fi
}}
complete -F _fireq fireq
)",
      fmt::join(names_of(commands), " "), values, options);
}

// Within '...[...]' of _arguments: no brackets, colons or quotes.
std::string zsh_text(const std::string& text) {
  std::string out = replaced(text, "'", "'\\''");
  for (const char* special : {"[", "]", ":"}) out = replaced(out, special, std::string("\\") + special);
  return out;
}

std::string zsh_script(const std::vector<CommandText>& commands) {
  std::string list, cases;
  for (const CommandText& c : commands) {
    list += fmt::format("    '{}:{}'\n", c.name, zsh_text(c.description));
    cases += fmt::format("    {})\n      _arguments", c.name);
    for (const OptionText& o : c.options) {
      const std::string action = !o.choices.empty()
                                     ? fmt::format(":value:({})", fmt::join(o.choices, " "))
                                     : (o.value.empty() ? "" : fmt::format(":{}:_files", zsh_text(o.value)));
      for (const std::string& name : o.names)
        cases += fmt::format(" \\\n        '*{}[{}]{}'", name, zsh_text(o.description), action);
    }
    cases += " \\\n        '*:file:_files' ;;\n";
  }
  return fmt::format(
      R"(#compdef fireq
# zsh completion for fireq: put this file into a folder of $fpath as "_fireq".
_fireq() {{
  local -a commands=(
{}  )
  if ((CURRENT == 2)); then
    _describe 'command' commands
    return
  fi
  local command=$words[2]
  shift words
  ((CURRENT--))
  case $command in
{}  esac
}}
if [[ $funcstack[1] == _fireq ]]; then
  _fireq "$@"
else
  compdef _fireq fireq
fi
)",
      list, cases);
}

std::string fish_script(const std::vector<CommandText>& commands) {
  const auto quoted = [](const std::string& text) {
    return "'" + replaced(replaced(text, "\\", "\\\\"), "'", "\\'") + "'";
  };
  std::string out =
      "# fish completion for fireq: put this file into a completions folder as \"fireq.fish\".\n";
  for (const CommandText& c : commands) {
    out += fmt::format("complete -c fireq -n __fish_use_subcommand -f -a {} -d {}\n", c.name,
                       quoted(c.description));
  }
  for (const CommandText& c : commands) {
    for (const OptionText& o : c.options) {
      out += fmt::format("complete -c fireq -n '__fish_seen_subcommand_from {}'", c.name);
      for (const std::string& name : o.names)
        out += name.starts_with("--") ? " -l " + name.substr(2) : " -s " + name.substr(1);
      if (!o.choices.empty()) {
        out += fmt::format(" -x -a {}", quoted(fmt::format("{}", fmt::join(o.choices, " "))));
      } else if (!o.value.empty()) {
        out += " -r -F";
      }
      out += fmt::format(" -d {}\n", quoted(o.description));
    }
  }
  return out;
}

// Text of a roff line: backslashes and hyphens as they are, nothing taken for a request.
std::string roff(const std::string& text) {
  std::string out = replaced(replaced(text, "\\", "\\e"), "-", "\\-");
  return !out.empty() && (out.front() == '.' || out.front() == '\'') ? "\\&" + out : out;
}

std::string roff_lines(const std::string& text) {
  std::string out = ".nf\n";
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    out += roff(text.substr(begin, end - begin)) + "\n";
    begin = end + 1;
  }
  return out + ".fi\n";
}

}  // namespace

std::string completion_script(const CLI::App& app, const std::string& shell) {
  const std::vector<CommandText> commands = commands_of(app);
  if (shell == "bash") return bash_script(commands);
  return shell == "zsh" ? zsh_script(commands) : fish_script(commands);
}

std::string manual_page(const CLI::App& app, const std::string& version) {
  std::string out = fmt::format(
      ".TH FIREQ 1 \"\" \"fireq {}\" \"User Commands\"\n.SH NAME\nfireq \\- {}\n.SH SYNOPSIS\n.B fireq\n.I "
      "command\n"
      "[options]\n",
      version, roff("Llama-family checkpoints to 4 bits"));
  out += ".SH DESCRIPTION\n" + roff(app.get_description()) + "\n";
  for (const CommandText& c : commands_of(app)) {
    out += fmt::format(".SH {}\n.B fireq {}\n[options]{}\n.PP\n{}\n", roff(c.name), roff(c.name),
                       roff(c.arguments), roff(c.description));
    for (const OptionText& o : c.options) {
      std::string value = o.choices.empty() ? o.value : fmt::format("{}", fmt::join(o.choices, "|"));
      if (!value.empty()) value = " \\fI" + roff(value) + "\\fR";
      out += fmt::format(".TP\n\\fB{}\\fR{}\n{}\n", roff(fmt::format("{}", fmt::join(o.names, ", "))), value,
                         roff(o.description));
    }
    if (!c.footer.empty()) out += ".PP\n" + roff_lines(c.footer);
  }
  return out + ".SH EXIT STATUS\n" + roff_lines(app.get_footer());
}

}  // namespace fireq::apps
